#!/usr/bin/env bash
# Generate the Python stubs of proto/ into src/paceline/v1 and src/paceline/internal/v1.
#
#   proto/generate.sh           write them
#   proto/generate.sh --check   fail, with the difference, when the committed stubs are not what
#                               proto/ generates
#
# The stubs refuse a runtime older than their generator, so constraints.txt holds grpcio-tools at the
# lowest grpcio that pyproject.toml allows. Types come from mypy-protobuf, which also types the gRPC
# stubs and carries the comments of the .proto files over.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-.venv/bin/python}"
bin="$(dirname "$python")"

case "${1:-}" in
    "") check=false ;;
    --check) check=true ;;
    *) echo "usage: proto/generate.sh [--check]" >&2; exit 2 ;;
esac

protos="$(cd proto && find . -name '*.proto' | sed 's|^\./||' | LC_ALL=C sort)"
if [[ -z "$protos" ]]; then
    echo "proto/generate.sh: no .proto file under proto/; nothing to generate" >&2
    exit 1
fi

fresh="$(mktemp -d)"
trap 'rm -rf "$fresh"' EXIT
# shellcheck disable=SC2086  # one argument a file is what is wanted
"$python" -m grpc_tools.protoc --proto_path=proto \
    --plugin=protoc-gen-mypy="$bin/protoc-gen-mypy" \
    --plugin=protoc-gen-mypy_grpc="$bin/protoc-gen-mypy_grpc" \
    --python_out="$fresh" --grpc_python_out="$fresh" \
    --mypy_out="quiet:$fresh" --mypy_grpc_out="quiet:$fresh" \
    $protos

# A file without a service yields an empty gRPC stub, which nobody imports.
for stub in $(find "$fresh" -name '*_pb2_grpc.py'); do
    grep -q '^class ' "$stub" || rm -f "$stub" "${stub}i"
done

stubs_under() { (cd "$1" && find . -path '*v1/*' -name '*_pb2*.py*' ! -name '*.pyc' | LC_ALL=C sort); }

if $check; then
    stale=false
    while read -r stub; do
        diff -u "src/paceline/$stub" "$fresh/paceline/$stub" || stale=true
    done < <({ stubs_under "$fresh/paceline"; stubs_under src/paceline; } | LC_ALL=C sort -u)
    if $stale; then
        echo "Generated stubs differ from proto/. Run 'make proto' and commit the result." >&2
        exit 1
    fi
else
    find src/paceline/v1 src/paceline/internal/v1 -name '*_pb2*.py*' ! -name '*.pyc' -delete
    while read -r stub; do
        cp "$fresh/paceline/$stub" "src/paceline/$stub"
    done < <(stubs_under "$fresh/paceline")
fi
