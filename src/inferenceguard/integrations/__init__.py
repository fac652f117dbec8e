"""The guard inside of what people use already: `custom_generate` of transformers (docs/integrations.md)."""

from inferenceguard.integrations.generate import GuardedGenerate, GuardedGenerateOutput, guarded_generate

__all__ = ["GuardedGenerate", "GuardedGenerateOutput", "guarded_generate"]
