# What an agent with "maintenance: true" needs besides its other rules: to put its own node into Consul's maintenance mode while it
# switches, and to end that. ${node} is the name of the Consul node.

node "${node}" {
  policy = "write"
}
