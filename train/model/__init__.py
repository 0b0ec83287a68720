"""The policy: loading, adapters, attention, the fused head, export."""
