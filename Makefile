# make demo   the whole program on text that Python carries: no download, under 4 minutes on 2 cores
# make test   everything that CI runs
# make check  formatting, lint, types
# make bench  how fast text becomes shards; SOURCE=DIR names a folder of parquet files

# A Python from 3.11 on that is installed; or name one: make demo PYTHON=python3.12
PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3.14 python3 python,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
BIN = .venv/bin
# What is installed beside the programs: pip's extras, such as EXTRAS=dev,ray
EXTRAS ?= dev
READY = .venv/ready-$(EXTRAS)
DATA = data_cache/python_docs
RUN = runs/demo
# Two ranks, as in the real job; one on a machine with a single GPU.
RANKS = $$($(BIN)/python -c 'import torch; print(1 if torch.cuda.device_count() == 1 else 2)')
TESTS = $$($(BIN)/python -c 'import torch; print(0 if torch.cuda.is_available() else 2)')

.PHONY: demo test check bench clean
.DELETE_ON_ERROR:

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Install one, or: make demo PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(READY)
	@echo; echo "== 1 of 5: text that Python carries, as documents"
	$(BIN)/python -m tests.python_docs $(DATA).jsonl
	@echo; echo "== 2 of 5: tokenize it into shards"
	$(BIN)/forge-prep tokenize $(DATA).jsonl --out $(DATA) --val-fraction 0.1 --overwrite
	@echo; echo "== 3 of 5: look at them"
	$(BIN)/forge-prep info $(DATA)
	@echo; echo "== 4 of 5: train configs/forge_tiny.toml from scratch on $(RANKS) ranks: a good two minutes on two cores"
	@rm -rf $(RUN)
	$(BIN)/torchrun --standalone --nproc_per_node=$(RANKS) --no-python $(BIN)/forge-train forge_tiny --data $(DATA) --out $(RUN)
	@echo; echo "== 5 of 5: let it write"
	$(BIN)/forge-sample $(RUN) --prompt "Return the" --max-tokens 60 --temperature 0.5 --repetition-penalty 1.3 --num-samples 2
	@echo; echo "Made: $(DATA)/ (shards, index.json) and $(RUN)/ (read $(RUN)/README.md first)."
	@echo "Next: source .venv/bin/activate"
	@echo "      forge-sample $(RUN) --prompt 'If the argument is'"
	@echo "      forge-export $(RUN) $(RUN)-hf"
	@echo "      and the real job: README.md, 'A model in a day'"

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The GPU's kernels first, in Triton's interpreter. Two tests at a time, of one thread each, where
# there is no GPU that they would share, and of a file one at a time.
test: check
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTS) tests/test_kernels.py tests/test_fused.py tests/test_int8.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTS) --dist loadfile --no-loadscope-reorder

bench: $(READY)
	$(BIN)/python -m tests.benchmarks.tokenize $(if $(SOURCE),--source $(SOURCE))

clean:
	rm -rf .venv runs data_cache/python_docs data_cache/python_docs.jsonl
