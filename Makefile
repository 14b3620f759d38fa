# Two commands: `make signoff` (the whole main job) and `make test` (every test). Both install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLAN ?= scenarios/quick.yaml
TORCH ?= torch==2.13.0
LOWEST := .venv-lowest
# By file, as fixtures are. Not those of the fewest tests last: one of a minute would keep one core waiting. Three processes
# on two cores: fast tests wait for other processes nearly half of their time.
SPREAD := --dist loadfile --no-loadscope-reorder

# Hosts are busy, and a test of real processes may fail for it: what failed (1; not what was interrupted or never began) runs
# once more, by itself. Both runs are shown. A test that passes only then needs a fix.
AGAIN := --numprocesses 1 --last-failed --last-failed-no-failures none
tests = $(BIN)/python -m pytest -m '$(1)' $(2) || { [ $$? -eq 1 ] && $(BIN)/python -m pytest -m '$(1)' $(AGAIN); }

# Hosts that set it have every process compile all modules anew, and tests start hundreds of processes.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install signoff test test-lowest gpu gpu-kit sample ops-check docs reference clean

install: $(VENV)/installed

# pip first: the one that comes with Python 3.11 takes three times the CPU. torch by number: a range takes the newest build,
# which may be for CUDA (several gigabytes). PyPI's build of this number is for CUDA, too: for one for CPUs set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=24.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	$(BIN)/python -m harness.capacity.ready
	touch $@

signoff: install
	$(BIN)/harness signoff $(PLAN)

test: install
	$(BIN)/ruff check .
	$(BIN)/ty check
	$(call tests,not server,--numprocesses 3 $(SPREAD))
	$(call tests,server and not alone,--numprocesses 2 $(SPREAD))
	$(call tests,server and alone,--numprocesses 1)

# The fast tests with every direct dependency at the lowest version that pyproject.toml takes, but torch: the lowest ones
# are to be had for CPUs from PyTorch's own index only.
test-lowest: $(LOWEST)/installed
	$(LOWEST)/bin/python -m pytest -m 'not server' --numprocesses 3 $(SPREAD)

$(LOWEST)/installed: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH) uv
	echo '$(TORCH)' > $(LOWEST)/torch.txt
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra test --constraint $(LOWEST)/torch.txt \
		--no-annotate --no-header --output-file $(LOWEST)/constraints.txt pyproject.toml
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/constraints.txt -e '.[test]'
	touch $@

# What a GPU host without a network needs, in parts of at most 64 MiB under build/gpu-kit.
gpu-kit: install
	$(BIN)/python benchmarks/gpu/kit.py

# The first twelve minutes on a GPU host: what it is, values, profile, kernels, streams, a short sign-off, in results/gpu/.
# On a CPU the same steps at preset tiny, in minutes. GPU_OPTIONS='--preset 7b': see benchmarks/gpu/one.sh --help.
gpu: install
	PYTHON=$(BIN)/python benchmarks/gpu/one.sh $(GPU_OPTIONS)

# The stored sample run and the README's table of it: make sample RUN=results/quick-1a2b3c4d, of a finished run of quick or mixed.
sample: install
	$(BIN)/python tests/make_sample.py $(RUN)

# Rules and dashboards of ops/: a real Prometheus scrapes real servers and is asked all of them. It needs Prometheus:
# apt-get install prometheus.
ops-check: install
	$(BIN)/python benchmarks/ops/check.py $(OPS_OPTIONS)

# The documentation, in build/site: it opens from there, without a network.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo build/site/index.html

# What the code determines of docs/reference, and the README's picture of the sample run.
reference: install
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/picture.py

clean:
	rm -rf $(VENV) $(LOWEST) .harness build *.egg-info
