"""Students as others load them: diffusers folders, adapters, ComfyUI workflows."""
