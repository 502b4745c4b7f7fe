"""heronry's models as classes of other packages; each file imports the package that it is for."""
