"""fal's wire protocol: what bodies hold, what answers look like, and the OpenAPI document."""
