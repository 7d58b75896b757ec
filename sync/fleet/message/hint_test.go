package message

import (
	"strings"
	"testing"

	"kedge/deployments"
)

// Advice fits the case: while a pin has a release rolled out, a push changes nothing; and a first release that is
// paused can't be aborted.
func TestHintsFitTheCase(t *testing.T) {
	t.Parallel()
	id := deployments.UnitID{Stage: "prod", Role: "web", Unit: "app"}
	release := deployments.Pointer{URL: "s3://acme/1/manifest.yaml", Digest: deployments.Digest{1}}
	back := &deployments.Progress{Phase: deployments.PhaseRolledBack}
	going := &deployments.Progress{Phase: deployments.PhaseRollingBack}
	before := &deployments.Progress{Phase: deployments.PhaseRollingBack, Next: release}
	paused := &deployments.Progress{Phase: deployments.PhasePaused, Reason: deployments.ReasonTooManyFailed}
	serving := &deployments.Progress{Phase: deployments.PhasePaused, Reason: deployments.ReasonPaused, Serving: true}
	approval := &deployments.Progress{Phase: deployments.PhasePendingApproval}
	facts := func(more ...string) deployments.Facts {
		f := deployments.Facts{"release": release.String()}
		for i := 0; i < len(more); i += 2 {
			f[more[i]] = more[i+1]
		}
		return f
	}
	step := func(what string, reason deployments.Reason, f deployments.Facts) string {
		says, hint := Step(id, "web-1", what, reason, f)
		return says + "\n" + hint
	}
	for _, c := range []struct {
		name, got  string
		want, lack string
	}{
		{"going back", RolloutHint(id, deployments.Record{Rollout: going}), "", "promote"},
		{"going back, and another waits", RolloutHint(id, deployments.Record{Rollout: before}), "kedge promote", "push"},
		{"rolled back", RolloutHint(id, deployments.Record{Rollout: back}), "push a better release", "unpin"},
		{"a pin's, rolled back", RolloutHint(id, deployments.Record{Rollout: back, Target: release,
			Pinned: &deployments.Pinned{}}), "kedge unpin prod/web/app", "push"},
		{"a pin's, rolled back, in explain", step("rollout", deployments.ReasonAborted,
			facts("phase", "rolled-back", "by_pin", "true")), "kedge unpin prod/web/app", "push"},
		{"paused", RolloutHint(id, deployments.Record{Rollout: paused, Stable: release}), "kedge abort", "push"},
		{"paused, and nothing to go back to", RolloutHint(id, deployments.Record{Rollout: paused}),
			"push a better release, or go on all the same: kedge resume", "abort"},
		{"paused, a first pin", RolloutHint(id, deployments.Record{Rollout: paused, Target: release,
			Pinned: &deployments.Pinned{}}), "pin a better release", "push"},
		{"paused, retried after it was stable", RolloutHint(id, deployments.Record{Rollout: paused, Target: release,
			Stable: release}), "push a better release, or go on all the same: kedge resume", "abort"},
		{"paused, in explain", step("rollout", deployments.ReasonPaused, facts("phase", "paused", "first", "true")),
			"kedge resume", "abort"},
		{"paused, where something else serves", RolloutHint(id, deployments.Record{Rollout: serving}), "kedge abort", "push"},
		{"a first release waits", RolloutHint(id, deployments.Record{Rollout: approval}), "kedge promote", "abort"},
		{"a release waits", RolloutHint(id, deployments.Record{Rollout: approval, Stable: release}), "kedge abort", "push"},
		{"the record", step("record", deployments.ReasonTarget, facts("commit", "4f2c91a")), "of Git commit 4f2c91a", "pin"},
		{"the record of a pin", step("record", deployments.ReasonTarget, facts("by_pin", "true")),
			"of the unit's pin", "Git"},
		{"the decision by a pin", Decision(deployments.ReasonTarget, facts("by_pin", "true")), "the unit's pin", "Git"},
		{"quarantine", step("quarantine", deployments.ReasonQuarantined, facts()), "in Git", "unpin"},
		{"quarantine of a pin's", step("quarantine", deployments.ReasonQuarantined, facts("pinned", "true")), "unpin", "Git"},
		{"a pin that is rolled out", step("unit pin", deployments.ReasonPinPaced, facts("until", "2026-11-24T09:00:00Z")),
			"kedge unpin prod/web/app; or deploy on every node at once: kedge pin prod/web/app " + release.String() +
				" --at-once --until 2026-11-24T09:00:00Z", "Git"},
		{"a record for a newer kedge", step("record", deployments.ReasonAgentTooOld,
			deployments.Facts{"key": "desired/prod/web/app", "error": "upgrade kedge here"}), "upgrade kedge here", "anew"},
	} {
		if !strings.Contains(c.got, c.want) || strings.Contains(c.got, c.lack) {
			t.Errorf("%s: %q, want %q without %q", c.name, c.got, c.want, c.lack)
		}
	}
}
