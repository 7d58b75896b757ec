package notify

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"

	"kedge/deployments"
	"kedge/deployments/safetext"
	"kedge/sync/fleet/message"
)

// commitStatus is a status that a commit of the deployments repo shows, for one unit or for the whole commit.
type commitStatus struct {
	commit      string
	name        string // "kedge/prod/web/app", or "kedge" for the whole commit
	state       statusState
	description string
	link        string
}

type statusState string

const (
	statusPending statusState = "pending"
	statusSuccess statusState = "success"
	statusFailure statusState = "failure"
)

// maxDescription is the longest description that GitHub takes, in characters; others take more.
const maxDescription = 140

// statusOf returns the status of a record's commit. ok is false if there is no commit, or the
// record is pinned or orphaned.
func statusOf(u unitNow) (s commitStatus, ok bool) {
	r := u.record
	s = commitStatus{commit: r.Commit, name: "kedge/" + u.id.String()}
	p := r.Rollout
	switch {
	case r.Commit == "" || r.Pinned != nil || r.Orphaned:
		return s, false
	case p == nil:
		s.state, s.description = statusSuccess, "every node may run "+nameOf(r.Target)
		if r.Paced {
			s.description = "the rollout of " + nameOf(r.Target) + " is complete"
		}
	case p.Phase == deployments.PhaseRollingBack, p.Phase == deployments.PhaseRolledBack,
		p.Phase == deployments.PhasePaused && p.Reason != deployments.ReasonPaused:
		s.state, s.description = statusFailure, message.Progress(p)
	default:
		s.state, s.description = statusPending, message.Progress(p)
	}
	s.description = clipped(s.description)
	return s, true
}

// clipped returns a description on one line, without secrets in URLs, and short enough for every server.
func clipped(text string) string {
	runes := []rune(message.OneLine(safetext.URLs(text)))
	if len(runes) > maxDescription {
		return string(runes[:maxDescription-3]) + "..."
	}
	return string(runes)
}

// write sends a status to the server.
func (c *StatusTarget) write(ctx context.Context, client *http.Client, s commitStatus) error {
	token, err := secretOr("token_file", "", c.TokenFile)
	if err != nil {
		return err
	}
	header := http.Header{"Content-Type": {"application/json"}}
	body := map[string]string{"description": s.description, "target_url": s.link}
	if s.link == "" {
		delete(body, "target_url")
	}
	var to string
	switch c.Provider {
	case GitLab:
		to = c.API + "/projects/" + url.PathEscape(c.Project) + "/statuses/" + s.commit
		header.Set("PRIVATE-TOKEN", token)
		body["name"] = s.name
		body["state"] = string(s.state)
		switch s.state {
		case statusPending:
			body["state"] = "running"
		case statusFailure:
			body["state"] = "failed"
		}
	default:
		to = c.API + "/repos/" + c.Project + "/statuses/" + s.commit
		header.Set("Authorization", "Bearer "+token)
		if c.Provider == Gitea {
			header.Set("Authorization", "token "+token)
		} else {
			header.Set("Accept", "application/vnd.github+json")
			header.Set("X-GitHub-Api-Version", "2022-11-28")
		}
		body["context"] = s.name
		body["state"] = string(s.state)
	}
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	if err := send(ctx, client, http.MethodPost, to, header, data); err != nil {
		return fmt.Errorf("commit status %s of %.12s: %w", s.name, s.commit, err)
	}
	return nil
}
