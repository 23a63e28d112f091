# `make demo` and `make test` are the two commands; each sets up all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTENSION := $(VENV)/.extension
RUST := Cargo.toml $(wildcard Cargo.lock) $(shell find src -name '*.rs')

.PHONY: demo test lint lint-rust lint-python docs bench old-cpus wheel clean

demo: $(EXTENSION)
	$(BIN)/python examples/digits.py

test: $(VENV)/.test $(EXTENSION)
	cargo test --release --quiet
	cargo test --release --quiet --no-default-features
	$(BIN)/python -m pytest

lint: lint-rust lint-python

lint-rust:
	cargo fmt --check
	cargo clippy --quiet --all-targets --features python -- -D warnings
	cargo clippy --quiet --all-targets --no-default-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps --features python --document-private-items

lint-python: $(VENV)/.test $(EXTENSION)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/basedpyright
	$(BIN)/python -m mypy.stubtest rmsprop._core
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/*.yml

# A warning is an error. Its code is run by the tests.
docs: $(VENV)/.test $(EXTENSION)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

bench: $(VENV)/.test $(EXTENSION)
	cargo bench
	$(BIN)/python benches/step.py

# The same bits on processors of other years, under qemu (Debian's package qemu-user).
old-cpus: $(EXTENSION)
	$(BIN)/python tests/old_cpus.py

# A wheel for every Linux on x86-64 of the last ten years: manylinux2014, linked by zig.
wheel: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --group wheel
	PATH="$(abspath $(BIN)):$$PATH" CARGO_TARGET_DIR=target/wheel $(BIN)/maturin build --release --zig \
		--target x86_64-unknown-linux-gnu --compatibility manylinux2014 --out dist

# The environment, in two parts: what the demo needs, and the many rivals and tools of the tests.
$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group demo
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --group test
	touch $@

# The extension, built in release mode and imported from python/.
$(EXTENSION): $(VENV)/.demo $(RUST)
	VIRTUAL_ENV=$(abspath $(VENV)) PIP_QUIET=1 $(BIN)/maturin develop --release --quiet
	touch $@

clean:
	cargo clean
	rm -rf $(VENV) build dist
