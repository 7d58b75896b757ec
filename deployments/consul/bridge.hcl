# What kedge bridge may do while a fleet goes over from stretcher: read the events that it hands on, and write what agents follow, a
# record where no mirror runs, or a pin. Remove its token when the fleet has gone over.
#
# ${prefix} has to be filled in: Consul takes the rules as they stand, too, and they allow nothing then.
#
#   prefix=kedge/ envsubst < bridge.hcl | consul acl policy create -name kedge-bridge -rules -

key_prefix "${prefix}" {
  policy = "list"
}

key_prefix "${prefix}desired/" {
  policy = "write"
}

key_prefix "${prefix}pins/" {
  policy = "write"
}

# consul watch -type event
event_prefix "" {
  policy = "read"
}
