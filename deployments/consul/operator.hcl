# What operators, and CI that waits for a rollout, may do: see everything, pin, and give orders to the mirror. They can't write what
# comes from Git, nor a node's report. For those who only look, leave out all but the first rule.
#
# ${prefix} has to be filled in: Consul takes the rules as they stand, too, and they allow nothing then.
#
#   prefix=kedge/ envsubst < operator.hcl | consul acl policy create -name kedge-operator -rules -

key_prefix "${prefix}" {
  policy = "list"
}

# kedge pin, unpin, rollback; consul kv put kedge/pins/…
key_prefix "${prefix}pins/" {
  policy = "write"
}

# kedge promote, pause, resume, abort, retry
key_prefix "${prefix}control/" {
  policy = "write"
}
