"""The model bundle: what a hospital gets at the end, as one signed folder. Not to be confused with `common.ops.app_bundle`, the app."""
