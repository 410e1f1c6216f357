# make run    the main job, from nothing: makes .venv, installs, runs
# make test   the tests                make check   lint, format and types
# make slow   the slow tests           make report  results/ in every format: page, figures, tables, into site/
# make bench  how near to the floor gradients and attacks run on this machine: results/bench/
# make parity CIFAR10=DATASET          our attacks and samplers against published ones: results/parity.md
# make cifar10 CIFAR10=DATASET [EXACT=DATASET]  our own CIFAR-10 models and their tables, into OUT (hours on a GPU)
# make cifar10 SIZE=compact …                    the same of networks for two cores (half a day)
PYTHON ?= python3
ARGS ?=
OUT ?= results/mine
SITE ?= site
SPECTRA ?= vae,map-gmm,diffpure,gdmp,langevin,latent,diffusevae,diffusevae-nvae,decoder

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CODE := purifiers attacks classifiers benchmark

.PHONY: run test slow parity check report bench tables headline install clean distclean

run: install
	$(BIN)/python -m benchmark run --purifier diffpure --attack autoattack $(ARGS)

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

slow: install
	$(BIN)/python -m pytest -q -m slow $(ARGS)

# CIFAR10 is a data set as --dataset takes it, e.g. parquet:test.parquet,only=exact,family=cifar10; half an hour.
parity: install
	$(BIN)/python -m pytest -q -m "slow or not slow" --parity results/parity.md tests/test_parity.py

check: install
	$(BIN)/ruff check $(CODE) tests shims
	$(BIN)/ruff format --check $(CODE) tests shims
	$(BIN)/mypy

# A few minutes; compare only with what the same machine said at the same load.
bench: install
	$(BIN)/python -m benchmark bench --batch-size 32 --repetitions 5 --compile --out results/bench $(ARGS)

# Every format from the recorded results into SITE, and the tables of the documents anew.
report: install
	$(BIN)/python -m benchmark tables README.md results/README.md
	$(BIN)/python -m benchmark report results --format html --out $(SITE)
	$(BIN)/python -m benchmark report results --figures --out $(SITE)/figures
	$(BIN)/python -m benchmark diagnose results/families/diagnosis.json --only $(SPECTRA) \
		--spectra $(SITE)/figures/spectra
	for form in md csv json; do $(BIN)/python -m benchmark report results --format $$form > $(SITE)/results.$$form; done
	$(BIN)/python -m benchmark report results --format latex > $(SITE)/results.tex
	$(BIN)/python -m benchmark report results --bibtex > $(SITE)/results.bib

install: .venv/.installed

# The last two lines in this order, and apart from the first: torchattacks pins a
# 2021 release of requests (so --no-deps; `pip check` goes on reporting it), and it
# brings a crippled copy of robustbench, which the real one must overwrite.
.venv/.installed: pyproject.toml constraints.txt shims/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name one with make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv: about 6 GB, a few minutes the first time"
	$(PIP) -e '.[robustbench,parquet,test,dev]' -e shims
	$(PIP) --no-deps torchattacks
	$(PIP) --force-reinstall --no-deps robustbench
	@touch $@

# The tables of README.md from records, and the records themselves anew into OUT (hours on two cores; they resume).
tables: install
	$(BIN)/python -m benchmark tables README.md results/README.md

# those whose worst case is the headline
ATTACKS = pgd,autoattack,pgd:momentum=0.75,halving=true

headline: install
	$(BIN)/python -m benchmark run --purifier identity,vae,diffpure --classifier resnet,resnet-at \
		--attack '$(ATTACKS)' --eps 16/255 --eps 0.1 --budget quick --n-examples 256 --out $(OUT)/headline
	$(BIN)/python -m benchmark run --budget paper --n-examples 64 --out $(OUT)/full
	$(BIN)/python -m benchmark run --attack pgd --budget quick --view bpda --n-examples 128 --out $(OUT)/checks
	$(BIN)/python -m benchmark run --attack pgd --budget quick --view blind --n-examples 128 --out $(OUT)/checks
	$(BIN)/python -m benchmark run --attack pgd:steps=40 --budget quick --n-examples 128 --out $(OUT)/checks
	$(BIN)/python -m benchmark run --attack pgd:eot=8 --budget quick --n-examples 128 --out $(OUT)/checks

# Victims and purifiers trained from nothing, their dials turned on validation images, then attacked at their defaults
# and at equal clean accuracy. Each line continues where it was stopped. EXACT is what training ends with and tables are
# of, where that isn't all of CIFAR10, e.g. CIFAR10=parquet:FOLDER EXACT=parquet:FOLDER,only=exact. TRAIN and RUN are
# further options of train and run, e.g. TRAIN='--epochs 40' RUN='--precision tf32 --channels-last'.
CIFAR10 ?= cifar10
EXACT ?= $(CIFAR10)
SIZE ?=
ifeq ($(SIZE),compact)
VICTIMS ?= resnet,resnet-at
MODELS ?= vae-compact,vqvae-compact,nvae-compact,vae-latent-compact,latent-compact,diffpure-compact,diffusevae-compact
BATCH ?= 32
MATCH ?= 0.7
endif
VICTIMS ?= resnet18,resnet18-at
MODELS ?= vae,vqvae,nvae,vae-latent,latent,diffpure,diffusevae
BATCH ?= 256
MATCH ?= 0.85
TRAIN ?=
RUN ?=
BUDGET ?= quick
IMAGES ?= 256
comma := ,
with = $(EXACT)$(if $(findstring :,$(EXACT)),$(comma),:)
models = $(subst $(comma), ,$(MODELS))
victim = $(firstword $(subst $(comma), ,$(VICTIMS)))
DIALS = vae:temperature={0.0,1.0,2.0,4.0} vqvae:codes={0,32,128} nvae:keep={2,3,4,5} \
	diffpure:t_star={0.05,0.1,0.15,0.2} latent:t_star={0.1,0.2,0.3} diffusevae:t_star={0.1,0.15,0.2,0.3} \
	vae-compact:code={1,2,4,8} vqvae-compact:codes={0,32,128} nvae-compact:keep={3,4,5,6} \
	diffpure-compact:t_star={0.03,0.05,0.1,0.15} latent-compact:t_star={0.03,0.05,0.1,0.2} \
	diffusevae-compact:t_star={0.05,0.1,0.15,0.2}
MADE = $(OUT)/cifar10$(if $(SIZE),-$(SIZE))
turned = $(filter $(addsuffix :%,$(models)),$(DIALS))

.PHONY: cifar10
cifar10: SHARED = --weights $(OUT)/weights --budget $(BUDGET) --yes $(RUN)
cifar10: TESTED = --dataset '$(EXACT)' --n-examples $(IMAGES) --attack '$(ATTACKS)' $(SHARED)
cifar10: install
	$(BIN)/python -m benchmark train $(VICTIMS),$(MODELS) --dataset '$(CIFAR10)' --finish '$(EXACT)' --out $(OUT)/weights $(TRAIN)
	for setting in $(foreach dial,$(turned),'$(dial)'); do \
		$(BIN)/python -m benchmark run --attack identity --draws 3 --dataset '$(with)split=validation' --n-examples 256 \
			--classifier $(victim) --purifier "$$setting" --out $(MADE)-dials $(SHARED) || exit 1; done
	for radius in '--norm Linf --eps 8/255' '--norm L2 --eps 0.5'; do \
		$(BIN)/python -m benchmark run --purifier identity,$(MODELS) --classifier $(VICTIMS) $$radius \
			--out $(MADE) $(TESTED) || exit 1; \
		chosen=$$($(BIN)/python -m benchmark report $(MADE)-dials --match $(MATCH) --columns purifier) || exit 1; \
		$(BIN)/python -m benchmark run --classifier $(victim) $$radius --purifier "$$chosen" \
			--out $(MADE)-matched $(TESTED) || exit 1; done
	$(BIN)/python -m benchmark bench --purifier $(lastword $(models)) --classifier $(victim) --dataset '$(EXACT)' \
		--weights $(OUT)/weights --batch-size $(BATCH) --out $(MADE)-bench
	$(BIN)/python -m benchmark report $(MADE) $(MADE)-matched --figures --out $(MADE)-figures
	$(BIN)/python -m benchmark report $(MADE) --compact

clean:
	rm -rf build *.egg-info shims/src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) tests shims -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
