"""A small study that shows the whole chain, from an AiiDA workflow through a gateway to a cluster and back.

The physics: ``ising`` is the program that runs on the cluster, ``onsager`` what is known exactly about the same model, and
``presentation`` the table and the plot. The workflow: ``study`` has its processes, ``submit`` runs it on any computer that
AiiDA knows. The surroundings: ``stage`` puts up a gateway and a temporary AiiDA profile, and takes everything down again.
"""
