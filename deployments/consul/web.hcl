# What kedge web, and people who only look, may do: see everything.
#
#   kedge acl web | consul acl policy create -name kedge-web -rules -

key_prefix "${prefix}" {
  policy = "list"
}
