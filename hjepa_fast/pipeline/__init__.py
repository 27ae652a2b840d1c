"""The H-JEPA system around the integrators: videos, latents, training, evaluation, figures.

Every stage reads files and writes files, so each can be run, resumed and replaced alone.
Heavy packages (av, transformers, matplotlib) are imported by the stage that needs them, when it needs them.
"""
