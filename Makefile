# `make demo` and `make test` are the two commands; each sets up all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CROSS := build/aarch64
EXTENSION := $(VENV)/.extension
RUST := Cargo.toml $(wildcard Cargo.lock) $(shell find src -name '*.rs')

.PHONY: demo test lint lint-rust lint-python docs bench wheel wheel-aarch64 wheels-test aarch64 clean

demo: $(EXTENSION)
	$(BIN)/python examples/digits.py

test: $(VENV)/.test $(EXTENSION)
	cargo test --quiet
	cargo test --quiet --no-default-features
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

# A wheel for every Linux of the last ten years: manylinux2014, linked by zig.
WHEEL = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/maturin build --release --zig --compatibility manylinux2014 --out dist

wheel: $(VENV)/.wheel
	CARGO_TARGET_DIR=target/wheel $(WHEEL) --target x86_64-unknown-linux-gnu

wheel-aarch64: $(VENV)/.wheel $(CROSS)/.rust
	RUSTC="$(abspath $(CROSS)/rustc)" CARGO_TARGET_DIR=target/aarch64 $(WHEEL) --target aarch64-unknown-linux-gnu

# The crate's tests and the array front's recorded trajectories on aarch64, under qemu.
aarch64: wheel-aarch64 $(CROSS)/.python
	PATH="$(abspath $(BIN)):$$PATH" RUSTC="$(abspath $(CROSS)/rustc)" CARGO_TARGET_DIR=target/aarch64 PROPTEST_CASES=8 \
		CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu cortex-a72 -L $(abspath $(CROSS)/python)" \
		$(BIN)/cargo-zigbuild test --release --quiet --tests --target aarch64-unknown-linux-gnu
	$(BIN)/python -m pip install --quiet --upgrade --target $(CROSS)/site --only-binary=:all: --python-version 3.13 \
		--platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 dist/*aarch64.whl pytest hypothesis
	PYTHONPATH=$(CROSS)/site PYTHONHOME=$(CROSS)/python/usr qemu-aarch64 -cpu cortex-a72 -L $(CROSS)/python $(CROSS)/python/usr/bin/python3 \
		-m pytest -p no:cacheprovider tests/test_goldens.py

# What installs, imports, steps and trains where: a row each, one of them for processors since 2008.
wheels-test: $(VENV)/.test wheel wheel-aarch64 $(CROSS)/.python
	$(BIN)/maturin sdist --out dist
	$(BIN)/python tests/wheels.py dist --arm64 $(CROSS)/python

# For aarch64 (Debian's packages mmdebstrap and qemu-user): a Rust that compiles for it, which a rustup without
# that target lacks, and a Python. Debian's, unpacked; its Rust runs with the libraries that came with it.
UNPACK = mmdebstrap --quiet --variant=extract --aptopt='APT::Install-Recommends "false"' \
	--aptopt='Acquire::Check-Valid-Until "false"'

$(CROSS)/.rust:
	mkdir -p $(CROSS)
	$(UNPACK) --architectures=amd64,arm64 --include=rustc,libstd-rust-dev:arm64 forky $(CROSS)/rust
	printf '#!/bin/sh\nexec "%s/ld-linux-x86-64.so.2" --library-path "%s" "%s/bin/rustc" --sysroot "%s" "$$@"\n' \
		$(abspath $(CROSS)/rust)/usr/lib/x86_64-linux-gnu $(abspath $(CROSS)/rust)/usr/lib/x86_64-linux-gnu \
		$(abspath $(CROSS)/rust)/usr $(abspath $(CROSS)/rust)/usr > $(CROSS)/rustc
	chmod +x $(CROSS)/rustc
	touch $@

$(CROSS)/.python:
	mkdir -p $(CROSS)
	$(UNPACK) --architectures=arm64 --include=python3,libstdc++6 trixie $(CROSS)/python
	test -e $(CROSS)/python/lib || ln -s usr/lib $(CROSS)/python/lib
	touch $@

# The environment, in two parts: what the demo needs, and the many rivals and tools of the tests.
$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --group demo
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --group test
	touch $@

$(VENV)/.wheel: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet --group wheel
	touch $@

# The extension, built in release mode and imported from python/.
$(EXTENSION): $(VENV)/.demo $(RUST)
	VIRTUAL_ENV=$(abspath $(VENV)) PIP_QUIET=1 $(BIN)/maturin develop --release --quiet
	touch $@

clean:
	cargo clean
	rm -rf $(VENV) build dist
