package object

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
)

// The SDK has no type for it, so its text is what tells.
func TestMissingCredentialsAreNamed(t *testing.T) {
	t.Parallel()
	client := s3.New(s3.Options{
		Region:       "us-east-1",
		BaseEndpoint: aws.String("http://127.0.0.1:1"),
		Retryer:      aws.NopRetryer{},
		Credentials: aws.NewCredentialsCache(aws.CredentialsProviderFunc(func(context.Context) (aws.Credentials, error) {
			return aws.Credentials{}, errors.New("no role")
		})),
	})
	_, err := client.GetObject(t.Context(), &s3.GetObjectInput{Bucket: aws.String("b"), Key: aws.String("k")})
	if err = s3Error(err); err == nil || !strings.HasPrefix(err.Error(), "no AWS credentials in the environment, a profile or an instance role: no role") {
		t.Errorf("%v; want it to say what is missing", err)
	}
	if trouble := new(transientError); !errors.As(err, &trouble) {
		t.Errorf("%v is for good; an instance's role takes a moment at boot", err)
	}
}
