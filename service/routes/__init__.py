"""The routes, one file for each part of the protocol. A route declares whom it serves; none imports another."""
