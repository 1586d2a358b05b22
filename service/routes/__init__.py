"""The routes, one file for each part of the protocol. A route declares who may call it; none imports another."""
