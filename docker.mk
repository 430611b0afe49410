# The deployment in Docker: every vllm-* target. Included by the Makefile; `make help` lists the targets.
# A setting comes from the command line, else from the environment, else from vllm/.env, else from the defaults here.

dotenv := $(shell sed -nE 's/^([A-Z_]+)=(.+)$$/\1 ?= \2/p' vllm/.env 2>/dev/null | sed 's/[$$]/$$$$/g; s/\#/\\\#/g' | tr ' ' '\001')
$(foreach line,$(dotenv),$(eval $(subst $(shell printf '\001'), ,$(line))))

STACK ?= cuda12
VLLM_IMAGE ?= vllm-batch-invariant:$(if $(filter cuda12,$(STACK)),latest,$(STACK))
VLLM_CONTAINER ?= vllm-batch-invariant
VLLM_MODEL ?= $(or $(MODEL_NAME),$(if $(filter cpu,$(STACK)),demo,meta-llama/Llama-3.1-8B-Instruct))
VLLM_PORT ?= 8000
VLLM_BIND ?= 127.0.0.1
VLLM_SHM_SIZE ?= 16g
VLLM_TEST_ARGS ?=
VLLM_READY_SECONDS ?= 3600

# What the server in the container reads. Each is handed over by name, so that no value, a token least of all, shows
# in a command line.
server_settings := MODEL_NAME MAX_MODEL_LEN HF_TOKEN HF_ENDPOINT HF_HUB_OFFLINE VLLM_ATTENTION_BACKEND VLLM_BIND \
  CUBLAS_WORKSPACE_CONFIG VLLM_API_KEY BATCH_INVARIANT BATCH_INVARIANT_LOG BATCH_INVARIANT_GEMM \
  BATCH_INVARIANT_ALLOW_UNPROVEN TENSOR_PARALLEL_SIZE GPU_MEMORY_UTILIZATION DTYPE SERVED_MODEL_NAME VLLM_EXTRA_ARGS \
  VLLM_CPU_KVCACHE_SPACE DRAIN_SECONDS

# A model's folder is mounted below /models; anything else is a name for the hub, or demo.
model_folder := $(if $(wildcard $(VLLM_MODEL)/config.json),$(abspath $(VLLM_MODEL)))
served_model := $(if $(model_folder),/models/$(notdir $(model_folder)),$(VLLM_MODEL))
VLLM_MODELS ?= $(if $(model_folder),$(patsubst %/,%,$(dir $(model_folder))))

# The container runs as whoever owns the Hugging Face cache: compose's own volume suits any user.
compose_user = $(if $(HF_CACHE),$(shell id -u):$(shell id -g),1000:1000)
run_cache = $(or $(HF_CACHE),$(HOME)/.cache/huggingface)
run_user = $(or $(VLLM_USER),$(shell id -u):$(shell id -g))

# For these targets alone: what else the Makefile runs sees its own environment. A $ of the user's is no variable's start.
as_given = $(if $(filter file,$(origin $(1))),$($(1)),$(value $(1)))
define hand_over
vllm-%: export $(1) := $$(call as_given,$(1))
endef
$(foreach name,STACK VLLM_IMAGE VLLM_CONTAINER VLLM_MODEL VLLM_MODELS VLLM_PORT VLLM_SHM_SIZE HF_CACHE $(server_settings),\
  $(if $(value $(name)),$(eval $(call hand_over,$(name)))))
vllm-%: override export MODEL_NAME := $(served_model)
vllm-%: export DOCKER_BUILDKIT := 1
vllm-%: export COMPOSE_DOCKER_CLI_BUILD := 1

vllm_python = $(firstword $(wildcard .venv/bin/python) python3)
vllm_url = http://$(if $(filter 0.0.0.0 localhost,$(VLLM_BIND)),127.0.0.1,$(VLLM_BIND)):$(VLLM_PORT)
compose = VLLM_USER=$(or $(VLLM_USER),$(compose_user)) \
  $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose) -f vllm/docker-compose.yml
every_profile = --profile cpu --profile monitoring
service := $(if $(filter cpu,$(STACK)),vllm-cpu,vllm)
services = $(if $(MONITORING),--profile monitoring up,up) $(if $(NO_BUILD),--no-build,--build)
monitors := $(if $(MONITORING),prometheus grafana)
gpus := $(if $(filter cpu,$(STACK)),,--gpus all)
# `-e NAME` of a variable that is not set would take away what the image sets.
run = docker run --name $(VLLM_CONTAINER) $(gpus) -p $(VLLM_BIND):$(VLLM_PORT):8000 --shm-size $(VLLM_SHM_SIZE) \
  -v "$(run_cache):/root/.cache/huggingface" -v $(VLLM_CONTAINER)-$(subst :,-,$(run_user)):/var/cache/batch-invariant \
  $(if $(VLLM_MODELS),-v "$(VLLM_MODELS):/models:ro") \
  $(foreach name,$(server_settings),$(if $(value $(name)),-e $(name))) \
  --user $(run_user) --read-only --tmpfs /tmp:exec,mode=1777 --cap-drop ALL --security-opt no-new-privileges

.PHONY: vllm-build vllm-run vllm-run-detached vllm-compose-up vllm-compose-up-detached vllm-compose-down \
  vllm-compose-logs vllm-test vllm-stop vllm-logs vllm-shell vllm-info vllm-push vllm-doctor test-docker \
  vllm-can-start vllm-image vllm-settings

vllm-settings:
	@case "$(STACK)" in cuda12|cuda13|cpu) ;; *) \
	  echo "STACK='$(STACK)' is not valid: cuda12, cuda13 or cpu is needed" >&2; exit 2; esac
	@case "$(VLLM_PORT)" in *[!0-9]*) \
	  echo "VLLM_PORT='$(VLLM_PORT)' is not valid: a port number is needed" >&2; exit 2; esac

vllm-build: vllm-settings ## Build the image of STACK (cuda12, cuda13, cpu)
	docker build -f Dockerfile.vllm --build-arg STACK=$(STACK) \
	  --build-arg VCS_REF=$(shell git rev-parse HEAD 2>/dev/null || echo unknown) -t $(VLLM_IMAGE) .

# An image of no registry is built where it is missing; one with a registry's name is Docker's to pull.
vllm-image: vllm-settings
	@docker image inspect $(VLLM_IMAGE) >/dev/null 2>&1 || case "$(VLLM_IMAGE)" in \
	  */*) ;; *) $(MAKE) --no-print-directory vllm-build ;; esac

vllm-can-start: vllm-settings
	@case "$(VLLM_BIND)" in 127.*|localhost|::1) ;; *) test -n "$$VLLM_API_KEY" || { \
	  echo "VLLM_BIND=$(VLLM_BIND) lets other machines in: set VLLM_API_KEY" >&2; exit 2; } ;; esac
	@if [ "$$(docker inspect -f '{{.State.Running}}' $(VLLM_CONTAINER) 2>/dev/null)" = true ]; then \
	  echo "the container $(VLLM_CONTAINER) is running already: make vllm-stop ends it" >&2; exit 2; fi

vllm-run: vllm-can-start vllm-image ## Run the server in the foreground
	@mkdir -p "$(run_cache)"
	@docker rm $(VLLM_CONTAINER) >/dev/null 2>&1 || true
	$(run) --rm $(VLLM_IMAGE)

vllm-run-detached: vllm-can-start vllm-image ## Run the server in the background
	@mkdir -p "$(run_cache)"
	@docker rm $(VLLM_CONTAINER) >/dev/null 2>&1 || true
	$(run) -d --restart unless-stopped --log-opt max-size=10m --log-opt max-file=5 $(VLLM_IMAGE)
	@echo "starting; make vllm-logs shows how far it is, make vllm-test waits for it and tests it"

vllm-compose-up: vllm-can-start ## Build and start with Compose in the foreground (MONITORING=1: Grafana, too)
	$(compose) $(services) $(service) $(monitors)

vllm-compose-up-detached: vllm-can-start ## Build and start with Compose in the background
	$(compose) $(services) -d $(service) $(monitors)
	@echo "starting; make vllm-compose-logs shows how far it is, make vllm-test waits for it and tests it"

vllm-compose-down: ## Stop and remove what Compose started; the caches stay
	$(compose) $(every_profile) down --remove-orphans

vllm-compose-logs: ## Follow the logs of what Compose started
	$(compose) $(every_profile) logs $(if $(NO_FOLLOW),,-f) --tail 200

vllm-test: vllm-settings ## Wait until the server is ready, then test that it is deterministic
	@$(vllm_python) vllm/wait_ready.py --url $(vllm_url) --container $(VLLM_CONTAINER) --seconds $(VLLM_READY_SECONDS)
	@$(vllm_python) vllm/test_determinism.py --url $(vllm_url) $(VLLM_TEST_ARGS)

vllm-stop: ## Stop and remove the container
	@if docker inspect $(VLLM_CONTAINER) >/dev/null 2>&1; then \
	  docker stop -t $$(($${DRAIN_SECONDS:-5} + 10)) $(VLLM_CONTAINER) >/dev/null && { docker rm $(VLLM_CONTAINER) >/dev/null 2>&1 || true; } \
	  && echo "stopped $(VLLM_CONTAINER)"; else echo "there is no container $(VLLM_CONTAINER)"; fi

vllm-logs: ## Follow the container's log
	docker logs $(if $(NO_FOLLOW),,-f) --tail 200 $(VLLM_CONTAINER)

vllm-shell: vllm-image ## Open a shell in the running container, or in a new one
	@terminal=$$(test -t 0 && echo -it || echo -i); \
	if [ "$$(docker inspect -f '{{.State.Running}}' $(VLLM_CONTAINER) 2>/dev/null)" = true ]; then \
	  docker exec $$terminal $(VLLM_CONTAINER) bash; else docker run --rm $$terminal $(gpus) $(VLLM_IMAGE) bash; fi

vllm-info: vllm-settings ## Show image, versions, GPU, driver, model, backend and switches
	@$(vllm_python) vllm/info.py

vllm-push: ## Push the image to VLLM_REGISTRY
	@test -n "$(VLLM_REGISTRY)" || { echo "set VLLM_REGISTRY, like VLLM_REGISTRY=registry.example.com/team" >&2; exit 2; }
	docker tag $(VLLM_IMAGE) $(VLLM_REGISTRY)/$(VLLM_IMAGE)
	docker push $(VLLM_REGISTRY)/$(VLLM_IMAGE)

vllm-doctor: ## Say what would keep the server from starting on this machine, and what mends it
	@$(vllm_python) vllm/doctor.py

test-docker: ## Test the image, Compose and every vllm-* target on a real Docker engine (CPU)
	$(vllm_python) -m pytest tests/docker
