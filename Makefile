# Thin targets; each makes the environment that it needs. PYTHON picks the interpreter of a new one.
PYTHON ?= python3
BIN := .venv/bin
SENTENCES := "a red circle" "two black squares" "three orange triangles" "two white stars" "a blue cross" \
	"two yellow rings" "three purple circles" "two green squares"

.PHONY: demo test check install clean

install: .venv/installed
# The real commands, as make prints them, on eight pictures that the demo checkpoint was not trained on.
demo: install
	@echo
	$(BIN)/clip-export build demo -o engines/demo --force
	@echo
	$(BIN)/clip-export verify engines/demo
	@echo
	$(BIN)/clip-export similarity engines/demo --images examples/pictures --plot engines/demo-similarity.png \
		--texts $(SENTENCES)
	@echo
	$(BIN)/clip-export build demo --context -o engines/demo-context --force
	@echo
	$(BIN)/clip-export context engines/demo-context "a (red:1.2) circle" --negative "blurry" --dialect comfyui

test: check
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# pip is the last that venv makes: without it, the making was interrupted.
.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/pip
	@echo "installing torch, onnx and onnxruntime into .venv; this takes a minute or more"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[export,cpu]'
	touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/pip
	@echo "installing the development extra into .venv; this takes a minute or more"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@ .venv/installed
