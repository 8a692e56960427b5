"""What `make test-vllm` runs: the engines on vLLM itself, on the CPU, in an environment of their own."""
