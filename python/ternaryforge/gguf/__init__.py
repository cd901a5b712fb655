# SPDX-License-Identifier: Apache-2.0
"""GGUF files: read as models, imported as checkpoint folders, and written for every engine's own types."""
