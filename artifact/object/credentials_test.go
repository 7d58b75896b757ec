package object

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
)

// The wait for credentials that a machine doesn't have is told while it lasts, once for all that wait.
func TestWaitForCredentialsIsTold(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		takes, result := 20*time.Second, errors.New("no credentials")
		c := &slowCredentials{log: slog.New(slog.NewTextHandler(&out, nil)), CredentialsProvider: aws.CredentialsProviderFunc(
			func(context.Context) (aws.Credentials, error) {
				time.Sleep(takes)
				return aws.Credentials{}, result
			})}
		lines := func() int {
			synctest.Wait() // for the timer that writes
			return strings.Count(out.String(), "waiting for AWS credentials")
		}
		try := func() {
			if _, err := c.Retrieve(t.Context()); !errors.Is(err, result) {
				t.Errorf("%v, want %v", err, result)
			}
		}
		go try()
		go try()
		time.Sleep(credentialsPatience + time.Millisecond)
		if lines() != 1 {
			t.Errorf("after a second: %s", out.String())
		}
		time.Sleep(takes)
		synctest.Wait()
		try()
		if lines() != 1 {
			t.Errorf("the next try tells it again: %s", out.String())
		}
		takes, result = time.Millisecond, nil
		try()
		time.Sleep(2 * credentialsPatience)
		takes = 2 * credentialsPatience
		try()
		if lines() != 2 {
			t.Errorf("%d lines, want another one after they had come: %s", lines(), out.String())
		}
	})
}

// A request to S3 says what it waits for, on a machine whose metadata service doesn't answer.
func TestRequestWithoutCredentialsSaysSo(t *testing.T) {
	nothing := filepath.Join(t.TempDir(), "nothing")
	for _, name := range []string{"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_EC2_METADATA_DISABLED",
		"AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_WEB_IDENTITY_TOKEN_FILE"} {
		t.Setenv(name, "")
	}
	t.Setenv("AWS_CONFIG_FILE", nothing)
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", nothing)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	t.Setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://"+silent.Addr().String())

	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	said := tellingLog{found: cancel}
	if _, err := New(Config{Log: slog.New(slog.NewTextHandler(&said, nil))}).Stat(ctx, "s3://bucket/key"); err == nil {
		t.Error("there is such an object")
	}
	if !errors.Is(context.Cause(ctx), context.Canceled) {
		t.Error("it was silent")
	}
}

// tellingLog calls found when a line about credentials is written.
type tellingLog struct{ found func() }

func (l *tellingLog) Write(line []byte) (int, error) {
	if strings.Contains(string(line), "waiting for AWS credentials") {
		l.found()
	}
	return len(line), nil
}
