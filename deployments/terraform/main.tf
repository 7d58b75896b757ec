# An AutoScaling group whose nodes converge by themselves. Nothing here names a release, so a deployment never touches it.

terraform {
  required_version = ">= 1.5"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = ">= 5.0"
    }
  }
}

locals {
  name = "${var.stage}-${var.role}"
}

resource "aws_launch_template" "node" {
  name_prefix            = "${local.name}-"
  image_id               = var.image_id
  instance_type          = var.instance_type
  vpc_security_group_ids = var.security_group_ids
  update_default_version = true

  iam_instance_profile {
    arn = aws_iam_instance_profile.node.arn
  }

  # IMDSv2 alone, and not beyond the machine itself: a request forged through an application must not read the role's credentials.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
    # The agent (ec2: true) reads its stage and roles from the tags below, without a right to ask EC2's API for them.
    instance_metadata_tags = "enabled"
  }

  user_data = base64encode(var.user_data)

  tag_specifications {
    resource_type = "instance"
    tags          = { Name = local.name, "kedge:stage" = var.stage, "kedge:roles" = var.role }
  }
}

resource "aws_autoscaling_group" "nodes" {
  name_prefix         = "${local.name}-"
  min_size            = var.min_size
  max_size            = var.max_size
  vpc_zone_identifier = var.subnet_ids
  target_group_arns   = var.target_group_arns

  # The load balancer asks the agent's /ready, which is 503 until all units have converged, and while one drains.
  health_check_type         = length(var.target_group_arns) > 0 ? "ELB" : "EC2"
  health_check_grace_period = var.boot_seconds
  default_instance_warmup   = 60

  # A new instance is in service when its agent has completed this (KEDGE_LIFECYCLE_HOOK=converged): after its first convergence. One
  # that doesn't converge is replaced. Heartbeats keep it waiting meanwhile, so this bounds how long a dead one waits.
  initial_lifecycle_hook {
    name                 = "converged"
    lifecycle_transition = "autoscaling:EC2_INSTANCE_LAUNCHING"
    default_result       = "ABANDON"
    heartbeat_timeout    = var.boot_seconds
  }

  launch_template {
    id      = aws_launch_template.node.id
    version = aws_launch_template.node.latest_version
  }

  lifecycle {
    create_before_destroy = true
  }
}
