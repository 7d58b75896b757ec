# What the agent of one node may do in one role; a node of several roles has these rules once a role.
#
# ${prefix}, ${stage}, ${role} and ${node} are filled in by Terraform's templatefile, or by hand:
#
#   prefix=kedge/ stage=prod role=web node=web-1 envsubst < agent.hcl |
#     consul acl policy create -name kedge-agent-web-1 -rules -
#
# node is the name of the Consul node that the agent talks to, which is the node's own name unless its --node says otherwise.

# So that the agent can ask for that name. It goes by its host's without this rule.
agent "${node}" {
  policy = "read"
}

# What should run here. "list" is "read" that also works where acl.enable_key_list_policy is on.
key_prefix "${prefix}desired/${stage}/${role}/" {
  policy = "list"
}
key_prefix "${prefix}pins/${stage}/${role}/" {
  policy = "list"
}

# This node's own report. No agent can speak for another, nor write anything that a node obeys.
key "${prefix}status/${stage}/${role}/${node}" {
  policy = "write"
}

# The session that holds the report. It is tied to the health of this node, so that a node that dies is seen to be gone.
session "${node}" {
  policy = "write"
}

# The service that it registers at this node's Consul agent. Its heartbeat, which goes no further than that, lets an agent that
# died be seen as gone within 30 s; without this rule it is not missed while its node lives.
service "kedge-agent" {
  policy = "write"
}
