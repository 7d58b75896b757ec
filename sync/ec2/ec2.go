// Package ec2 connects an agent to Amazon EC2: it reads an instance's stage and roles from its tags, and tells
// AutoScaling when the instance is ready, or that it won't be.
//
// Instance metadata is read only by IMDSv2. It has the tags only if the instance was launched with
// InstanceMetadataTags enabled. No node needs ec2:DescribeTags, as tags are read from the metadata. A lifecycle hook
// needs autoscaling:CompleteLifecycleAction and autoscaling:RecordLifecycleActionHeartbeat for the instance's own
// group.
package ec2

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/feature/ec2/imds"
	"github.com/aws/aws-sdk-go-v2/service/autoscaling"
	"github.com/aws/smithy-go"
	"github.com/aws/smithy-go/logging"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"kedge/deployments/wait"
)

// The tags that give an instance its stage and roles.
const (
	TagStage = "kedge:stage"
	TagRoles = "kedge:roles" // separated by commas or spaces
	// tagGroup is set by AutoScaling itself.
	tagGroup = "aws:autoscaling:groupName"
)

// Instance is the machine's identity, from the metadata service.
type Instance struct {
	ID, Region string
	Tags       map[string]string
}

// Describe reads the instance's identity from the metadata service, within 10 s. AWS_EC2_METADATA_SERVICE_ENDPOINT
// overrides the service's address. With an error, it returns what was read before, such as the ID.
func Describe(ctx context.Context) (Instance, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cfg, err := config.LoadDefaultConfig(ctx, config.WithLogger(logging.Nop{}))
	if err != nil {
		return Instance{}, fmt.Errorf("reading AWS's configuration: %w", err)
	}
	client := imds.NewFromConfig(cfg, func(o *imds.Options) { o.EnableFallback = aws.FalseTernary })
	i := Instance{Tags: map[string]string{}}
	doc, err := client.GetInstanceIdentityDocument(ctx, nil)
	if err != nil {
		return i, fmt.Errorf("asking for the instance's metadata: %w", err)
	}
	i.ID, i.Region = doc.InstanceID, doc.Region
	names, err := get(ctx, client, "tags/instance")
	if response := new(smithyhttp.ResponseError); errors.As(err, &response) &&
		response.HTTPStatusCode() == http.StatusNotFound {
		return i, fmt.Errorf(
			"the metadata of instance %s has no tags: launch it with InstanceMetadataTags=enabled, or set stage and roles in "+
				"agent.yaml",
			i.ID,
		)
	}
	if err != nil {
		return i, fmt.Errorf("asking for the names of the instance's tags: %w", err)
	}
	for name := range strings.Lines(names) {
		name = strings.TrimSpace(name)
		if i.Tags[name], err = get(ctx, client, "tags/instance/"+name); err != nil {
			return i, fmt.Errorf("asking for the instance's tag %s: %w", name, err)
		}
	}
	return i, nil
}

func get(ctx context.Context, client *imds.Client, path string) (string, error) {
	out, err := client.GetMetadata(ctx, &imds.GetMetadataInput{Path: path})
	if err != nil {
		return "", err
	}
	defer out.Content.Close()
	data, err := io.ReadAll(io.LimitReader(out.Content, 64<<10))
	return string(data), err
}

// Hook is a lifecycle hook that holds back new instances until it is completed:
// autoscaling:EC2_INSTANCE_LAUNCHING.
type Hook struct {
	Name     string
	Instance Instance
	// Group is the AutoScaling group; empty: the one in the instance's tags.
	Group string
	// Timeout is how long an instance may take to converge before it is abandoned. There is no default.
	Timeout time.Duration
	// Beat is the time between heartbeats, which restart AutoScaling's own timeout; 0: a minute.
	Beat time.Duration
	Log  *slog.Logger // must not be nil

	answer time.Duration // bounds a call, as Amazon's client has no timeout; 0: 30 s
	// actionWait is how long complete waits for an action that AutoScaling doesn't know yet, as an instance can be
	// ready before the action begins. 0: 2 min.
	actionWait time.Duration
	pause      time.Duration // about what complete waits before its first repetition; 0: 500 ms
}

// Run completes the hook's action with CONTINUE once converged is closed, or with ABANDON if the
// timeout passes first, so that AutoScaling replaces the instance. An instance that converges after
// the timeout, while AutoScaling can't be reached, still gets CONTINUE. An agent that restarts on
// an instance in service finds no action to complete, which is no error. Calls that fail are
// repeated until ctx ends. Run returns an error if ctx ends first, the group isn't known, or AWS's
// configuration can't be read.
func (h Hook) Run(ctx context.Context, converged <-chan struct{}) error {
	if h.Group == "" {
		h.Group = h.Instance.Tags[tagGroup]
	}
	if h.Group == "" {
		return fmt.Errorf("lifecycle hook %s: the instance %s has no tag %s: set autoscaling_group", h.Name,
			h.Instance.ID, tagGroup)
	}
	h.Beat, h.answer = cmp.Or(h.Beat, time.Minute), cmp.Or(h.answer, 30*time.Second)
	h.actionWait, h.pause = cmp.Or(h.actionWait, 2*time.Minute), cmp.Or(h.pause, 500*time.Millisecond)
	cfg, err := config.LoadDefaultConfig(ctx, config.WithRegion(h.Instance.Region), config.WithLogger(logging.Nop{}))
	if err != nil {
		return fmt.Errorf("lifecycle hook %s: reading AWS's configuration: %w", h.Name, err)
	}
	client := autoscaling.NewFromConfig(cfg)
	beating, stop := context.WithCancel(ctx)
	var beats sync.WaitGroup
	defer beats.Wait()
	defer stop()
	beats.Go(func() { h.beat(beating, client) })
	late := time.NewTimer(h.Timeout)
	defer late.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-converged:
	case <-late.C:
	}
	if err := h.complete(ctx, client, converged); err != nil {
		return fmt.Errorf("lifecycle hook %s: %w", h.Name, err)
	}
	return nil
}

// beat sends heartbeats until ctx ends, even while the action can't be completed.
func (h Hook) beat(ctx context.Context, client *autoscaling.Client) {
	beat := time.NewTicker(h.Beat)
	defer beat.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-beat.C:
		}
		once, done := context.WithTimeout(ctx, h.answer)
		_, err := client.RecordLifecycleActionHeartbeat(once, &autoscaling.RecordLifecycleActionHeartbeatInput{
			AutoScalingGroupName: &h.Group, LifecycleHookName: &h.Name, InstanceId: &h.Instance.ID})
		done()
		if err != nil && ctx.Err() == nil {
			h.Log.Debug("a heartbeat of the lifecycle hook failed", "hook", h.Name, "error", err)
		}
	}
}

// complete completes the action: with CONTINUE if the instance has converged by the time of a try,
// else with ABANDON. It gives up, without an error, if AutoScaling knows no action once actionWait
// has passed.
func (h Hook) complete(ctx context.Context, client *autoscaling.Client, converged <-chan struct{}) error {
	pause := wait.NewBackoff(h.pause, 30*time.Second)
	began, logged := time.Now(), ""
	for {
		result := "ABANDON"
		select {
		case <-converged:
			result = "CONTINUE"
		default:
		}
		once, done := context.WithTimeout(ctx, h.answer)
		_, err := client.CompleteLifecycleAction(
			once,
			&autoscaling.CompleteLifecycleActionInput{AutoScalingGroupName: &h.Group,
				LifecycleHookName: &h.Name, InstanceId: &h.Instance.ID, LifecycleActionResult: &result},
		)
		done()
		switch {
		case err == nil:
			level, says := slog.LevelInfo, "told AutoScaling that the instance is ready"
			if result != "CONTINUE" {
				level, says = slog.LevelError, "the instance did not converge in time: told AutoScaling to replace it"
			}
			h.Log.Log(ctx, level, says, "hook", h.Name, "group", h.Group, "instance", h.Instance.ID, "result", result)
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case noAction(err):
			if time.Since(began) > h.actionWait {
				h.Log.Info("AutoScaling does not wait for this instance: no lifecycle action to complete", "hook", h.Name,
					"group", h.Group, "instance", h.Instance.ID)
				return nil
			}
		case logged != cause(err):
			logged = cause(err)
			h.Log.Warn("the lifecycle hook can't be completed: trying again", "hook", h.Name, "group", h.Group,
				"result", result, "error", err)
		}
		if err := pause.Wait(ctx); err != nil {
			return err
		}
	}
}

// cause returns the API's code for why it refused a call, or "no answer" if the call failed otherwise.
func cause(err error) string {
	var api smithy.APIError
	if errors.As(err, &api) {
		return api.ErrorCode()
	}
	return "no answer"
}

// noAction reports whether AutoScaling answered that the hook doesn't hold the instance back, either no longer or not
// yet.
func noAction(err error) bool {
	var api smithy.APIError
	return errors.As(err, &api) && api.ErrorCode() == "ValidationError" &&
		strings.Contains(api.ErrorMessage(), "No active Lifecycle Action")
}
