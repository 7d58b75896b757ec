output "autoscaling_groups" {
  description = "The groups' names by colour."
  value       = { for color, group in aws_autoscaling_group.nodes : color => group.name }
}

output "target_groups" {
  description = "For a listener's rule, whose weights say how much traffic each colour gets."
  value       = { for color, group in aws_lb_target_group.nodes : color => group.arn }
}

output "role_arn" {
  description = "For Consul's log-in by AWS identity, which gives each node its own token."
  value       = aws_iam_role.node.arn
}

output "party_role_arns" {
  description = "The publisher's and the mirror's roles, as far as they have principals."
  value       = { for party, role in aws_iam_role.party : party => role.arn }
}
