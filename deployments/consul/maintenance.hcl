# What an agent with "maintenance: true" needs besides its other rules: to put its own node into Consul's maintenance mode while it
# switches, and to end that. ${node} is the name of the Consul node.
#
#   node=web-1 envsubst < maintenance.hcl | consul acl policy create -name kedge-maintenance-web-1 -rules -

node "${node}" {
  policy = "write"
}
