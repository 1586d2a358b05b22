"""fal's wire protocol: request bodies, responses, and the OpenAPI document."""
