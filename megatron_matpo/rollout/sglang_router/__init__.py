"""SGLang's own router as a process of the manager (`rollout.router: sglang`)."""
