# Every target sets up what it needs: a .venv here, with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
TORCH := torch==2.13.0
UV := uv==0.13.9
INSTALL := $(BIN)/uv pip install --python $(BIN)/python --quiet --compile-bytecode -c constraints.txt $(TORCH)

.PHONY: demo docs site test test-all test-lowest kernels test-llama test-cluster soak test-arm wheel-test cross-check lint format bench bench-serve storyteller constraints screenshots clean

demo: .venv/run
	@echo "set-up done"
	@$(BIN)/heronry generate "Once upon a time" --echo --speed --temperature 0.8 --seed 1

PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --durations=10
test: .venv/dev .venv/redis-server
	@$(MAKE) --no-print-directory -j2 --output-sync lint kernels
	$(PYTEST)

# with what takes long for what it proves: every generation where one stands for all, processes that are killed
test-all: .venv/dev .venv/redis-server .venv/chromium build/transformers-tests build/clients
	@$(MAKE) --no-print-directory -j2 --output-sync lint kernels LEVELS=--all
	$(PYTEST) -m ""

# transformers' own tests of every model, which only its source package holds
build/transformers-tests: .venv/dev
	rm -rf $@
	mkdir -p $@
	$(BIN)/python -m pip download --quiet --no-deps --no-binary transformers --dest $@ \
		transformers==$$($(BIN)/python -c "from importlib.metadata import version; print(version('transformers'))")
	tar -xzf $@/transformers-*.tar.gz -C $@ --strip-components=1

# clients of OpenAI's API, and schemathesis, which the tests drive as programs: what they bring stays out of .venv
build/clients: .venv/dev
	rm -rf $@
	$(BIN)/uv venv --quiet $@
	$(BIN)/uv pip install --quiet --python $@/bin/python llm==0.36 langchain-openai==1.7.4 schemathesis==4.32.5

kernels: .venv/dev
	$(BIN)/python tests/compile_all.py $(LEVELS)

# what llama.cpp makes of the GGUF files written here; compiling it takes minutes, so make test leaves it out
test-llama: .venv/bench
	$(BIN)/python -m pytest tests/convert/test_peers.py

# a real Ray on this machine; it is large, so make test leaves it out. With haproxy (Debian: apt-get install haproxy) also
# servers behind that
test-cluster: .venv/dev .venv/redis-server
	$(INSTALL) -e ".[cluster]"
	$(BIN)/python -m pytest -m "" tests/data/test_cluster.py tests/serve/test_cluster_serving.py

# clients of the server that connect, cancel and die, for MINUTES; servers that are killed; and requests of every kind
MINUTES := 20
soak: .venv/dev build/clients
	$(BIN)/python tests/serve/soak.py --minutes $(MINUTES)
	$(BIN)/python -m pytest -m "" tests/serve/test_load.py tests/serve/test_kept.py
	$(BIN)/python tests/serve/fuzz.py --max-examples 20

# the wheel with compiled libraries for this platform, run in an environment without a compiler
wheel-test:
	rm -rf build/wheel build/wheel-env
	$(PYTHON) -m venv build/wheel-env
	HERONRY_PREBUILT=1 build/wheel-env/bin/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	build/wheel-env/bin/python -m pip install --quiet -c constraints.txt $(TORCH)
	build/wheel-env/bin/python -m pip install --quiet -c constraints.txt $(TORCH) "$$(echo build/wheel/*.whl)[cli]"
	build/wheel-env/bin/python tests/try_wheel.py

# every kernel on an emulated ARM processor; needs qemu-aarch64 and aarch64-linux-gnu-g++ (Debian: qemu-user
# g++-aarch64-linux-gnu)
test-arm: .venv/dev
	$(BIN)/python -m pytest -rs tests/arm/run_arm.py

# the lowest versions that pyproject.toml allows, in an environment of their own: a few tests of every room
LOWEST := tests/test_checkpoint.py tests/test_quantization.py tests/test_memory.py tests/ops/test_wkv7.py \
	tests/ops/test_packed.py tests/models/test_models.py tests/text tests/engine/test_llm.py \
	tests/engine/test_constraints.py tests/stores/test_stores.py tests/data/test_token_file.py \
	tests/train/test_trainer.py tests/train/test_adapters.py tests/convert/test_conversion.py tests/convert/test_onnx.py \
	tests/integrations/test_transformers.py tests/test_cli.py
test-lowest:
	$(PYTHON) -m venv --clear build/lowest
	build/lowest/bin/python -m pip install --quiet $(TORCH) $(UV)
	build/lowest/bin/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct $(TORCH) \
		-e ".[cli,train,convert,vision,onnx,serve]" pytest==8.0.0 pytest-xdist==3.6.1 hypothesis==6.103.0 psutil==6.0.0 transformers==5.16.0
	build/lowest/bin/python -m pytest -n auto --dist loadfile -k "not neither_typer" $(LOWEST)

# the C++ compiled, not run, for the systems that are not here
ZIG := ziglang==0.17.1
cross-check:
	$(PYTHON) -m venv build/zig-env
	build/zig-env/bin/python -m pip install --quiet $(ZIG)
	build/zig-env/bin/python tests/cross_check.py

# the documentation: served at localhost:8000 while it is written, or built into build/site. make test builds it too
ZENSICAL := PYTHONPATH=docs $(BIN)/zensical
docs: .venv/dev
	$(ZENSICAL) serve

site: .venv/dev
	$(ZENSICAL) build --strict --clean

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# timings: beside the peers, on this machine; nothing else should be running
bench: .venv/bench
	mkdir -p build
	$(BIN)/heronry bench --json build/bench.json

# a server with one client and with many; for another model: make bench-serve BENCH="--model FILE --threads 2"
bench-serve: .venv/dev
	$(BIN)/python tests/serve/bench.py $(BENCH)

# trains the bundled model again: make storyteller STORIES=stories.jsonl.gz PASSES=7
PASSES ?= 7
storyteller: .venv/dev
	@test -n "$(STORIES)" || { echo "say where the texts are: make storyteller STORIES=stories.jsonl.gz"; exit 2; }
	$(BIN)/python examples/storyteller.py --stories $(STORIES) --out storyteller --passes $(PASSES)

# pip installs torch first and by its exact version, so that a machine which offers a CPU build of it takes that one; uv,
# which would not look there, installs the rest and leaves torch as it is. All is compiled to bytecode here, on every core:
# where Python may not write it later (PYTHONDONTWRITEBYTECODE), importing torch would take twice as long every time
.venv/torch: Makefile constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt $(TORCH) $(UV)
	$(BIN)/python -m compileall -qq -j0 .venv/lib/python*/site-packages/torch || true  # some of it is for later Pythons
	@touch $@

.venv/run: .venv/torch pyproject.toml
	$(INSTALL) -e ".[cli]"
	$(BIN)/python -m compileall -q heronry
	-@$(BIN)/python -m heronry.build wkv7 rwkv7  # without a compiler PyTorch does it
	@touch $@

.venv/dev: .venv/torch pyproject.toml
	$(INSTALL) -e ".[dev,docs,plots,train,convert,onnx,vision,serve]"
	$(BIN)/python -m compileall -q heronry
	@touch $@ .venv/run

# a Redis for the tests, which they leave out where there is none; on Debian root can install it. RUNLEVEL=1: not started
.venv/redis-server: .venv/torch
	@command -v redis-server >/dev/null || \
		timeout 120 sh -c "apt-get update && RUNLEVEL=1 apt-get install -y --no-install-recommends redis-server" \
			>/dev/null 2>&1 </dev/null || \
		echo "redis-server is missing and could not be installed: the tests with Redis are skipped"
	@touch $@

# a browser for the tests of the chat page, in the same way
.venv/chromium: .venv/torch
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
		timeout 300 sh -c "apt-get update && apt-get install -y --no-install-recommends chromium" >/dev/null 2>&1 </dev/null || \
		echo "chromium is missing and could not be installed: the tests of the chat page are skipped"
	@touch $@

# the pictures of docs/chat-page.md
screenshots: .venv/dev .venv/chromium
	$(BIN)/python tests/serve/screenshots.py

# llama.cpp is compiled here for this processor, without what reads pictures; with AMX take clang or gcc 13, for what
# gcc 12 makes of its AMX code crashes
.venv/bench: .venv/dev
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $(CMAKE_ARGS)" $(INSTALL) -e ".[bench,convert]"
	@touch $@

# renews constraints.txt; torch and what only it needs stay out, the pin above says what it is
constraints:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(UV)
	echo "$(TORCH)" > .venv/torch.txt
	$(BIN)/uv pip compile pyproject.toml .venv/torch.txt --universal --python-version 3.10 --extra cli --extra dev --extra docs --extra plots \
		--extra train --extra convert --extra onnx --extra vision --extra serve --extra bench --extra cluster --upgrade --no-annotate --no-header --quiet --output-file .venv/resolved.txt
	echo "# Made by 'make constraints' for every Python from 3.10 on." > constraints.txt
	grep -vE '^(nvidia-|cuda-|triton|torch==)' .venv/resolved.txt >> constraints.txt

clean:
	rm -rf .venv .cache build dist *.egg-info
