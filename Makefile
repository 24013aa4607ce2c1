# Everything a developer or operator runs. `make help` lists it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help run doctor setup setup-dev build test lint types rust pytest clients fmt bench bench-baseline bench-lifecycle bench-proxy bench-isolation fuzz docs lock clean

export PATH := $(CURDIR)/.venv/bin:$(PATH)

help: ## Show the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do printf '%-15s %s\n' "$$target" "$$text"; done

run: build ## Set up, build and serve in the foreground; Ctrl-C stops everything
	@exec sandgate serve

doctor: build ## Say what this host lacks, and how to fix it
	@sandgate doctor

setup: ## Install host packages and run-time dependencies
	@scripts/setup

setup-dev: ## The same with what the tests need
	@scripts/setup --dev

build: setup ## Build the native parts in place
	@scripts/build

test: setup-dev ## Set up, build, then every check and test
	@scripts/build
	@$(MAKE) --no-print-directory lint types rust clients pytest

lint: ## ruff, and hadolint for the Dockerfile
	@ruff check .
	@ruff format --check .
	@hadolint Dockerfile

types: ## mypy --strict, and the compiled modules against their stubs
	@mypy
	@python -m mypy.stubtest --ignore-disjoint-bases --allowlist native/stubtest.allow native._frames native._core

rust: ## cargo fmt, clippy and tests
	@cargo fmt --manifest-path native/Cargo.toml --all --check
	@cargo clippy --manifest-path native/Cargo.toml --locked --workspace --all-targets --quiet -- --deny warnings
	@cargo check --manifest-path native/fuzz/Cargo.toml --target-dir native/target --locked --quiet
	@cargo test --manifest-path native/Cargo.toml --locked --workspace --quiet

clients: ## Environments with each supported release of the MIOSA client, and what the browser test loads
	@scripts/client-envs
	@scripts/browser-env

pytest: ## The Python tests
	@pytest

fmt: ## Format everything
	@ruff check --fix-only --quiet .
	@ruff format .
	@cargo fmt --manifest-path native/Cargo.toml --all

bench: bench-baseline bench-lifecycle bench-proxy bench-isolation ## Every measurement of docs/performance.md

bench-baseline: build ## Measure a running stack (loadtests/baseline)
	@python -m loadtests.baseline

bench-lifecycle: build ## Measure saving, copying, pausing and waking (loadtests/lifecycle); CASES="waking --cycles" chooses
	@python -m loadtests.lifecycle $(CASES)

bench-proxy: build ## Compare the plane with other proxies (loadtests/proxy); CASES="http-1k tls-1k" chooses
	@python -m loadtests.proxy $(CASES)

bench-isolation: build ## 100,000 requests while parts of a server die and routes change (loadtests/isolation)
	@python -m loadtests.isolation

fuzz: ## Fuzz every parser, SECONDS=300 each; TARGETS="request body" chooses
	@scripts/fuzz $(or $(SECONDS),300) $(TARGETS)

docs: build ## Renew the documents that are printed from tables in the code
	@python -m gateway.settings >docs/settings.md
	@python -m gateway.observability.metrics >docs/metrics.md
	@python -m gateway.dialects.miosa.reference >docs/api.md

lock: ## Renew requirements/*.lock
	@scripts/lock

clean: ## Remove what was built, not the data
	rm -rf .venv .build build dist native/target native/fuzz/target native/bin native/*.so .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
