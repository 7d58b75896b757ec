output "autoscaling_group" {
  value = aws_autoscaling_group.nodes.name
}

output "role_arn" {
  description = "For Consul's log-in by AWS identity, which gives each node its own token."
  value       = aws_iam_role.node.arn
}
