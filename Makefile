# One word for each thing a contributor does. The commands behind them create or reuse .venv.
.PHONY: help check test docs bench fuzz

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

check:  ## format, lint, types, unit tests: minutes
	./launch/test.sh --quick

test:  ## everything that CI runs
	./launch/test.sh

docs:  ## the documentation site, in site/
	./launch/docs.sh

bench:  ## one benchmark: make bench NAME=b1_step_time
	.venv/bin/python tests/benchmarks/$(or $(NAME),$(error NAME is missing, such as NAME=b1_step_time)).py

fuzz:  ## mutated inputs for minutes: make fuzz KIND=configs CASES=2000 SEED=1 (default: 500 of every kind)
	OMP_NUM_THREADS=1 .venv/bin/python tests/fuzz $(if $(KIND),--kind $(KIND)) --cases $(or $(CASES),500) --seed $(or $(SEED),0) --save fuzz-failures
