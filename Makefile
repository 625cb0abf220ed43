# make up     set up, build the image, boot the example and run a first command in it
# make test   every test, two at a time but for those of an emulated host, whose clock suffers from company
# make box    a shell on a KVM host that QEMU emulates (tests/kvm)
# make docs   the documentation as a site, in site/
# make bench, bench-kvm   the measurements; those under KVM in an emulated host
.PHONY: setup box up down test lint format docs bench bench-kvm lock clean

NIXBOX = ../../.venv/bin/nixbox

setup:
	@scripts/setup

up: setup
	@cd examples/hello && $(NIXBOX) up && $(NIXBOX) run -- sh -c 'uname -a; cat /etc/os-release'

down:
	@cd examples/hello && $(NIXBOX) down

test:
	@scripts/setup test
	@.venv/bin/pytest tests/kvm
	@.venv/bin/pytest --ignore tests/kvm --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

format: setup
	@.venv/bin/ruff check --fix --quiet .
	@.venv/bin/ruff format --quiet .

docs: setup
	@PYTHONDONTWRITEBYTECODE=1 NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo site/index.html

box: setup
	@.venv/bin/python -m tests.kvm

bench:
	@scripts/setup bench
	@.venv/bin/python -m bench

bench-kvm:
	@scripts/setup bench
	@.venv/bin/python -m bench.kvm

# Move the Python dependencies to today's versions (needs uv from PyPI).
lock:
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-header \
	  --python-version 3.11 --extra dev --extra krun pyproject.toml --output-file requirements.lock
	.venv/bin/python scripts/application.py lock

clean:
	rm -rf .venv site .mypy_cache .ruff_cache .pytest_cache .hypothesis
