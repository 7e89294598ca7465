from paceline.bench import growth_router


def test_every_size_gives_every_figure() -> None:
    result = growth_router.measure({"workers": [2, 4], "waiting": [40, 80], "running": [600]})
    assert list(result["by_workers"]) == ["2", "4"]
    assert list(result["by_waiting"]) == ["40", "80"]
    for sizes in result.values():
        for figures in sizes.values():
            assert all(value > 0 for value in figures.values())
    death = result["death"]["600"]
    assert death["longest_pause_ms"] < death["back_in_queue_ms"] + death["sent_again_ms"]
