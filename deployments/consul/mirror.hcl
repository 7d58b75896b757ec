# What the mirror may do. Every host that runs one, as a standby too, needs its own, with ${node} the name of the Consul node
# that it talks to.
#
#   prefix=kedge/ node=mirror-1 envsubst < mirror.hcl | consul acl policy create -name kedge-mirror-1 -rules -

# What it alone writes. A standby writes mirror/hook only, to pass a webhook on to the mirror that holds the lease.
key_prefix "${prefix}desired/" {
  policy = "write"
}
key_prefix "${prefix}history/" {
  policy = "write"
}
key_prefix "${prefix}mirror/" {
  policy = "write"
}

# Operators' orders, which it removes as it carries them out.
key_prefix "${prefix}control/" {
  policy = "write"
}

# What it mostly only reads. It makes the folder key of each new role (${prefix}pins/prod/web/, with an empty value),
# without which nobody can tell a missing key from a lost permission. Consul has no rule for just those. Where your roles seldom
# change, make both a "list" and add one rule a role, for these exact keys:
#
#   key "${prefix}pins/prod/web/"   { policy = "write" }
#   key "${prefix}status/prod/web/" { policy = "write" }
#
# It also removes what nodes said that died three days ago. With those exact rules it may not: such nodes stay in kedge status, as gone.
key_prefix "${prefix}pins/" {
  policy = "write"
}
key_prefix "${prefix}status/" {
  policy = "write"
}

# So that the mirror can ask for that name, and warn if the token of a kedge agent is for the same Consul node. It does its work
# without this rule.
agent "${node}" {
  policy = "read"
}

# The lease: of several mirrors, the one whose session holds it writes. Whoever may write sessions of the same Consul node can end
# it: run mirrors where no agent of kedge runs.
session "${node}" {
  policy = "write"
}

# The service that it registers while it holds the lease. Its heartbeat is what lets a standby take over within seconds; without this
# rule that takes up to twice the lease's time.
service "kedge-mirror" {
  policy = "write"
}
