# Every target works on a fresh clone: the first one called makes .venv and installs the project into it.
# Parameters of a run notebook:  make pretrain P="-p depth 6 -p num_iterations 200"
PY    ?= python3
V     := .venv/bin
P     ?=
# the gpu extra brings the Hopper kernels; it is chosen where a driver answers
EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo dev,gpu || echo dev)
RUN    = $(V)/dh_run

.PHONY: pretrain finetune speedrun tokenizer bench inference eval figures chat serve lab test weekly install docs clean-notebooks

pretrain: .venv/.ready     ## train a model (default: depth 4 on the shipped sample) and write the executed notebook
	$(RUN) pretrain $(P)

finetune: .venv/.ready     ## mid-train, fine-tune and judge the newest pretrained model (P goes to the first two)
	$(RUN) midtrain $(P)
	$(RUN) sft $(P)
	$(RUN) chat_eval

speedrun: .venv/.ready     ## every stage, from text to a chat model, and its report card
	$(RUN) speedrun $(P)

chat: .venv/.ready         ## talk to the newest model in the terminal (P="-p 'a question'")
	@$(V)/dh_chat $(P)

serve: .venv/.ready        ## its web page and OpenAI-compatible interface
	@$(V)/dh_serve $(P)

tokenizer: .venv/.ready    ## train a tokenizer and compare its compression
	$(RUN) tokenizer $(P)

bench: .venv/.ready        ## speed of kernels, models and training steps on this machine
	$(RUN) bench $(P)

inference: .venv/.ready    ## speed and memory of answering
	$(RUN) inference $(P)

eval: .venv/.ready         ## bits per byte by source and CORE of the newest pretrained model
	$(RUN) base_eval $(P)

figures: .venv/.ready      ## the README's measured figures and their pictures from runs/records (P=--check only compares)
	$(V)/python -m nano_dh.figures $(P)

lab: .venv/.ready          ## chapters and runs in JupyterLab
	$(V)/jupyter lab $(P)

test: .venv/.ready         ## every chapter and every test
	$(V)/python -m pytest -n auto -rsfE $(P)

weekly: .venv/.ready       ## the long tests too (NANO_DH_DATA=FOLDER: on the full sets), and each test against the mutant it is to notice
	NO_FORK=1 $(V)/python -m pytest -n auto -rsfE --slow $(P)
	$(V)/python tests/mutants.py

docs: .venv/.docs          ## the book as a site in _docs/ that needs no network; fails with a dead link
	NO_MKDOCS_2_WARNING=1 $(V)/mkdocs build --strict --quiet
	@echo "open _docs/index.html"

clean-notebooks: .venv/.ready
	$(V)/nbdev_export && $(V)/nbdev_clean && $(V)/nbdev_clean --fname runs

install: .venv/.ready

.venv/.docs: .venv/.ready
	$(V)/python -m pip install -q -e '.[docs]'
	@touch $@

.venv/.ready: pyproject.toml
	$(PY) -m venv .venv
	$(V)/python -m pip install -q -e '.[$(EXTRA)]'
	@touch $@
