"""For people who live in another tool: its interfaces over our search. Imported only by them."""
