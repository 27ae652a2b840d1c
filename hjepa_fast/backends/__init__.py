"""One module a backend; each computes the same rollout and imports no other backend."""
