package workloadapi_test

import (
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

var insecureOption = grpc.WithTransportCredentials(insecure.NewCredentials())
