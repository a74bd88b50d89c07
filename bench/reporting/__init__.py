"""Tables and plots, made from the store or from MLflow without computing anything."""
