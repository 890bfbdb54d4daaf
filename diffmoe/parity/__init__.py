"""Proof that training spread over ranks equals one plain process."""
