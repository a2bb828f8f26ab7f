# SPDX-License-Identifier: Apache-2.0
"""One file per arrow of the pipeline: files in, files out. Stages meet through files alone."""
