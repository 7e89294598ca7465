import json
import random
from pathlib import Path

import platformdirs
import pytest
from tiny_tokenizer import BOS_ID, TEMPLATE, byte_ids, byte_tokenizer, write_tokenizer
from tokenizers import decoders

from paceline.errors import ConfigError, InvalidRequestError
from paceline.router.chat_template import ChatMessage, ChatTemplate
from paceline.router.detokenize import Detokenizer
from paceline.router.text_stream import TextStream
from paceline.router.tokenize import PromptTokenizer

MAX_BYTES = 10_000
HELLO = [ChatMessage("user", "hello")]


def test_special_tokens_are_those_of_the_post_processor(tmp_path: Path) -> None:
    with_bos = PromptTokenizer.from_folder(write_tokenizer(tmp_path, adds_bos=True))
    assert with_bos.encode_text("hi") == [BOS_ID, *byte_ids("hi")]
    plain = PromptTokenizer.from_folder(write_tokenizer(tmp_path, adds_bos=False))
    assert plain.encode_text("hi") == byte_ids("hi")
    assert plain.encode_text("") == []


def test_chat_has_the_special_tokens_of_its_template_and_no_others(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.from_folder(write_tokenizer(tmp_path, adds_bos=True))
    ids = tokenizer.encode_chat(HELLO, MAX_BYTES)
    assert ids == [BOS_ID, *byte_ids("[user]hello\n[assistant]")]


def test_template_in_its_own_file_wins(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("own")
    tokenizer = PromptTokenizer.from_folder(tmp_path)
    assert tokenizer.encode_chat(HELLO, MAX_BYTES) == byte_ids("own")


def test_default_of_several_named_templates_is_used(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = PromptTokenizer.from_folder(tmp_path)
    assert tokenizer.encode_chat(HELLO, MAX_BYTES) == byte_ids("yes")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("chat_template.jinja", "yes é"),
        ("chat_template.json", '{"chat_template": "yes é"}'),
        ("additional_chat_templates/default.jinja", "yes é"),
        ("tokenizer_config.json", '{"chat_template": {"default": "yes é", "rag": "no"}}'),
    ],
)
def test_template_is_found_in_every_file_that_can_hold_it(
    path: str, text: str, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, template=None)
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_bytes(text.encode())
    tokenizer = PromptTokenizer.from_folder(tmp_path)
    assert tokenizer.encode_chat(HELLO, MAX_BYTES) == byte_ids("yes é")


def test_named_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template=None)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("no")
    with pytest.raises(ConfigError, match="named rag, and none is named default"):
        PromptTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("value", [3, [3], [{"name": "default"}]])
def test_template_that_is_no_template_is_refused(value: object, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template=None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ConfigError, match=r"chat_template of .* cannot be read"):
        PromptTokenizer.from_folder(tmp_path)


def test_template_has_the_tokens_that_only_an_older_file_names(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<bos>"}')
    tokenizer = PromptTokenizer.from_folder(tmp_path)
    assert (tokenizer.encode_chat(HELLO, MAX_BYTES))[0] == BOS_ID


def test_chat_without_template_is_refused(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.from_folder(write_tokenizer(tmp_path, template=None))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.encode_chat(HELLO, MAX_BYTES)


def test_empty_conversation_is_refused(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.from_folder(write_tokenizer(tmp_path))
    with pytest.raises(InvalidRequestError, match="at least one message"):
        tokenizer.encode_chat([], MAX_BYTES)


def test_chat_that_its_template_makes_too_long_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template="{{ 'x' * 10001 }}")
    tokenizer = PromptTokenizer.from_folder(tmp_path)
    with pytest.raises(InvalidRequestError, match=r"become 10001 bytes of text .* at most 10000"):
        tokenizer.encode_chat(HELLO, MAX_BYTES)


def test_what_the_template_says_against_messages_reaches_the_client(tmp_path: Path) -> None:
    tokenizer = PromptTokenizer.from_folder(write_tokenizer(tmp_path))
    with pytest.raises(InvalidRequestError, match="no such role: pirate"):
        tokenizer.encode_chat([ChatMessage("pirate", "ahoy")], MAX_BYTES)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        PromptTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a tokenizer that can be read"):
        PromptTokenizer.from_folder(tmp_path)
    write_tokenizer(tmp_path, template="{% if %}")
    with pytest.raises(ConfigError, match="does not compile"):
        PromptTokenizer.from_folder(tmp_path)


def test_decoder_that_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="WordPiece"):
        PromptTokenizer.from_folder(tmp_path)


def test_templates_have_what_transformers_gives_them() -> None:
    source = (
        "{%- for m in messages %}\n    {%- if loop.first %}{% continue %}{% endif %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}\n{%- endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    text = ChatTemplate(source, {}).render([*HELLO, ChatMessage("user", "<é>")])
    assert '{"role": "user", "content": "<é>"}' in text
    assert text.endswith("4True")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set x = messages.append(1) %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content.x }}",
        "{{ 'x' | dictsort }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_templates_cannot_leave_their_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(source, {}).render(HELLO)


def test_template_equals_transformers_rendering(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<bos>", eos_token="<eos>"
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>&"}]
    wanted = reference.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    template = ChatTemplate(TEMPLATE, {"bos_token": "<bos>", "eos_token": "<eos>"})
    assert template.render([ChatMessage(**m) for m in messages]) == wanted


def _smollm2_folders() -> list[Path]:
    cache = Path(platformdirs.user_cache_dir("paceline"))
    return sorted(cache.glob("**/SmolLM2*/tokenizer.json"))


def test_smollm2_prompts_and_text_equal_those_of_transformers() -> None:
    folders = _smollm2_folders()
    if not folders:
        pytest.skip("SmolLM2 has not been converted on this machine; `paceline up` does it")
    transformers = pytest.importorskip("transformers")
    folder = folders[0].parent
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = PromptTokenizer.from_folder(folder)
    text = "The quick 😀 fox — naïve café. 日本語\n  indented"
    ids = tokenizer.encode_text(text)
    assert ids == reference(text).input_ids
    chat = tokenizer.encode_chat([ChatMessage("user", text)], MAX_BYTES)
    messages = [{"role": "user", "content": text}]
    assert chat == reference.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert _stream(tokenizer.detokenizer, ids) == text
    draw, num_ids = random.Random(0), len(reference) + 5
    for _ in range(100):
        output = [draw.randrange(num_ids) for _ in range(50)]
        wanted = reference.backend_tokenizer.decode(output, skip_special_tokens=True)
        assert _stream(tokenizer.detokenizer, output) == wanted


def _stream(detokenizer: Detokenizer, token_ids: list[int]) -> str:
    stream = TextStream(detokenizer, continues_text=True)
    for token_id in token_ids:
        stream.push(token_id)
    stream.flush()
    return stream.take()
