"""The figures of a grid."""
