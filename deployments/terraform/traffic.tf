# A target group for each colour. Traffic goes to the application's port; health is the agent's to tell, on its own port: /ready is 200
# while every unit runs what it should and its checks pass, and 503 before the first convergence, while a unit drains, and when it is
# unhealthy. The application's own page knows nothing of a switch that is about to come.

resource "aws_lb_target_group" "nodes" {
  for_each = var.traffic == null ? {} : var.groups

  name                 = "${local.name}-${each.key}"
  port                 = var.traffic.port
  protocol             = var.traffic.protocol
  vpc_id               = var.vpc_id
  deregistration_delay = 60

  # A node is out after 2 answers of 503: within 10 s. A manifest's drain has to be longer, as in drain: 15s.
  health_check {
    path                = "/ready"
    port                = var.ready_port
    protocol            = "HTTP"
    matcher             = "200"
    interval            = 5
    timeout             = 3
    healthy_threshold   = 2
    unhealthy_threshold = 2
  }
}

# Releases come from S3 by way of this, not through a NAT gateway that counts each byte.
resource "aws_vpc_endpoint" "s3" {
  count = length(var.route_table_ids) > 0 ? 1 : 0

  vpc_id            = var.vpc_id
  vpc_endpoint_type = "Gateway"
  service_name      = "com.amazonaws.${data.aws_region.current.id}.s3"
  route_table_ids   = var.route_table_ids
}
