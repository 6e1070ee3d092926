PYTHON ?= python3
BIN := .venv/bin
CASE ?= bench
INSTALLED := .venv/installed
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test lint format bench wheel

demo: $(INSTALLED)  ## real retail purchases -> profiles, scores, report
	$(BIN)/python -m ubp_fast.run

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## reports, never edits
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu')

bench: $(INSTALLED)  ## make bench CASE=flash_attention
	$(BIN)/python -m pytest benchmarks -k $(CASE)

wheel: $(INSTALLED)
	$(BIN)/pip wheel --no-deps -w dist .

$(INSTALLED): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[demo,test,bench,lint]"
	touch $@
